//! What the last store call of a turn holds, frame by frame. Pure, but for what the server remembers of chats.
//!
//! Trap: frames that ask about the same group have the same operations; whoever settles them must not take what they brought.

use std::collections::BTreeMap;
use std::ops::Range;

use proto::name::Chat;
use proto::wire::{self, Code};

use super::{Decided, Outcomes, Planned, Step};
use crate::answer;
use crate::core::Core;
use crate::group::Act;
use crate::store::{Append, MessageId, Op};

/// Groups whose members are listed in a turn: of 10,000 each takes the store 15 to 20 ms.
pub const GROUPS_LISTED_MAX: usize = 4;

/// The operations of all frames, each of which is told where its own are. What is too much for one turn is answered, and left out.
pub fn last_ops(core: &Core, steps: &mut Vec<Step>, out: &mut Outcomes) -> Vec<Op> {
    let mut ops = Vec::with_capacity(steps.len());
    let mut listed: BTreeMap<String, Range<usize>> = BTreeMap::new();
    steps.retain_mut(|step| {
        let from = ops.len();
        if let Planned::Members { members, chat } = &step.ask {
            let chat = chat.to_string();
            if let Some(ops) = listed.get(&chat) {
                step.ops = ops.clone();
                return true;
            }
            if listed.len() >= GROUPS_LISTED_MAX {
                let error = answer::unavailable(core.config.limits.retry_after_ms);
                let about = wire::Error { request: members.request, chat: members.chat.clone(), ..error };
                out.answers.push(answer::error(&step.frame, about));
                return false;
            }
            of_step(core, step, &mut ops);
            listed.insert(chat, from..ops.len());
        } else {
            of_step(core, step, &mut ops);
        }
        step.ops = from..ops.len();
        true
    });
    ops
}

/// The operations of one frame.
fn of_step(core: &Core, step: &Step, ops: &mut Vec<Op>) {
    match &step.ask {
        Planned::Login { login, device, number, grant } => {
            ops.push(Op::Bind {
                user: *number,
                device: *device,
                attempt: login.attempt,
                connection: step.frame.connection,
                devices_max: core.config.limits.devices_max,
                issued_s: grant.issued_s,
            });
        }
        Planned::Send { send, chat, act } => {
            let (refusal, act) = match (chat, act) {
                _ if send.body.len() > core.config.limits.message_bytes_max => {
                    (Some(Code::MessageTooLarge), Act::Nothing)
                }
                (_, Decided::Refused(code)) => (Some(*code), Act::Nothing),
                (_, Decided::NotNow) => return,
                // The chat must stand in its members' lists first; without that the message waits for a resend.
                (Chat::Pair(..), _) if !core.chat_is_listed(&chat.to_string()) => return,
                (_, Decided::Step(act)) => (None, act.clone()),
            };
            // A fault that the tortures must find: every try is a message of its own.
            let undone = crpc::failpoint::switch("dedupe_off");
            ops.push(Op::Append(Append {
                chat: chat.to_string(),
                sender: step.user_name.clone(),
                id: if undone {
                    MessageId::Unnamed
                } else {
                    MessageId::Numbered { stream: send.stream, n: send.n }
                },
                body: send.body.clone(),
                refusal,
                kind: send.kind(),
                act,
                token: None,
            }));
        }
        Planned::Sync { chats, .. } => {
            ops.extend(
                chats.iter().map(|chat| Op::Head { chat: chat.clone(), user: step.user_name.clone() }),
            );
            // Behind all heads: what is read later of who may see them is not less strict.
            let groups = chats.iter().filter(|chat| chat.starts_with('#'));
            ops.extend(groups.map(|chat| Op::Member { chat: chat.clone(), user: step.user_name.clone() }));
        }
        Planned::Pull { pull, chat, limit } => {
            let name = chat.to_string();
            ops.push(Op::Pull {
                chat: name.clone(),
                reader: step.user_name.clone(),
                cursor: pull.cursor,
                limit: *limit,
                reverse: pull.reverse,
            });
            if matches!(chat, Chat::Group(_)) {
                ops.push(Op::Member { chat: name, user: step.user_name.clone() });
            }
        }
        Planned::Members { chat, .. } => {
            let (chat, user, cursors) =
                (chat.to_string(), step.user_name.clone(), core.config.limits.receipts);
            ops.extend([Op::Head { chat: chat.clone(), user }, Op::Members { chat, cursors }]);
        }
        Planned::Ghost(_) => {}
        Planned::Closed => {
            ops.push(Op::Unbind { user: step.frame.user, connection: step.frame.connection });
        }
    }
}
