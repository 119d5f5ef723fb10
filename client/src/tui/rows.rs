//! A chat as rows of the screen: times, marks, wrapped texts, days. Pure; what is scrolled and drawn counts these rows.
//!
//! Trap: rows are made from the end, as many as are asked for. A chat of a thousand long messages is wrapped as a whole
//! only when somebody scrolls to its beginning.

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};

use super::chat::{Chat, Older, What};
use super::text;

/// The last rows of a chat, newest last: at least `wanted`, fewer when there are no more.
pub fn last_rows(chat: &Chat, columns: usize, wanted: usize, zone: &TimeZone) -> Vec<Line<'static>> {
    let mut rows = Rows { chat, columns, zone, reversed: Vec::new(), day: None };
    let settled = chat.entries().iter();
    let items = settled.map(Item::Settled).chain(chat.outgoing().iter().map(Item::Sending));
    for item in items.rev() {
        if rows.reversed.len() >= wanted {
            break;
        }
        rows.item(item);
    }
    if rows.reversed.len() < wanted {
        rows.end_day(None);
        let beginning = match chat.older {
            Older::Maybe => BEGINNING,
            Older::Asked => ASKED,
            Older::None => FIRST,
        };
        rows.put(text::wrap(beginning, columns).into_iter().map(|row| Line::styled(row, DIM)).collect());
    }
    rows.reversed.reverse();
    rows.reversed
}

/// How many rows the whole chat has.
pub fn count(chat: &Chat, columns: usize, zone: &TimeZone) -> usize {
    last_rows(chat, columns, usize::MAX, zone).len()
}

enum Item<'a> {
    Settled(&'a super::chat::Entry),
    Sending(&'a super::chat::Outgoing),
}

struct Rows<'a> {
    chat: &'a Chat,
    columns: usize,
    zone: &'a TimeZone,
    /// Newest first.
    reversed: Vec<Line<'static>>,
    /// Of the rows put last: their heading is due when another day comes.
    day: Option<Date>,
}

impl Rows<'_> {
    fn item(&mut self, item: Item<'_>) {
        let (time_us, mark, body) = match &item {
            Item::Sending(outgoing) => {
                (outgoing.time_us, "…", self.text(&self.chat.me, &outgoing.text, true, DIM, &[]))
            }
            Item::Settled(entry) => match &entry.what {
                What::Message { id, sender, mine, text } => {
                    let mark = if *mine { self.chat.mark(*id) } else { "" };
                    let mut rows = self.text(sender, text, *mine, Style::new(), &[]);
                    if *mine && let Some(counts) = self.chat.counts(*id) {
                        self.put_behind(&mut rows, counts);
                    }
                    (entry.time_us, mark, rows)
                }
                What::Failed { text, in_doubt, why } => {
                    let mark = if *in_doubt { "?" } else { "✗" };
                    (entry.time_us, mark, self.text(&self.chat.me, text, true, RED, &[why]))
                }
                What::Remark(remark) => {
                    let rows = text::wrap(&format!("— {remark} —"), self.columns)
                        .into_iter()
                        .map(|row| Line::styled(row.to_owned(), YELLOW))
                        .collect();
                    self.end_day(self.date(entry.time_us));
                    return self.put(rows);
                }
            },
        };
        let time =
            self.local(time_us).map_or_else(|| "--:--".to_owned(), |time| time.strftime("%H:%M").to_string());
        self.end_day(self.date(time_us));
        let style = match mark {
            "●✓" => Style::new().fg(Color::Cyan),
            "✓" | "✓✓" => Style::new().fg(Color::Green),
            "✗" | "?" => RED,
            _ => DIM,
        };
        let gutter = [Span::styled(time, DIM), Span::styled(format!(" {mark:>2} "), style)];
        let indent = self.indent();
        let rows = body.into_iter().enumerate().map(|(at, mut line)| {
            let front = match at {
                0 if indent == GUTTER => gutter.to_vec(),
                0 => Vec::new(),
                _ => vec![Span::raw(" ".repeat(indent))],
            };
            line.spans.splice(0..0, front);
            line
        });
        let rows = rows.collect();
        self.put(rows);
    }

    /// `sender: text`, wrapped; what follows the first row can never look like the beginning of a message.
    fn text(
        &self,
        sender: &str,
        body: &str,
        mine: bool,
        style: Style,
        behind: &[&str],
    ) -> Vec<Line<'static>> {
        let columns = self.columns.saturating_sub(self.indent());
        let sender = text::shorten(sender, (columns / 3).max(4));
        let whole = format!("{sender}: {body}");
        let mut rows: Vec<Line<'static>> =
            text::wrap(&whole, columns).into_iter().map(|row| Line::styled(row.to_owned(), style)).collect();
        let name_style = if mine { DIM } else { Style::new().fg(Color::Cyan).add_modifier(Modifier::BOLD) };
        if let Some(first) = rows.first_mut() {
            let row = first.spans.iter().map(|span| &*span.content).collect::<String>();
            if let Some(rest) = row.strip_prefix(&format!("{sender}:")) {
                first.spans =
                    vec![Span::styled(format!("{sender}:"), name_style), Span::raw(rest.to_owned())];
            }
        }
        for remark in behind {
            let wrapped = text::wrap(remark, columns).into_iter();
            rows.extend(
                wrapped.map(|row| Line::styled(row.to_owned(), style.add_modifier(Modifier::ITALIC))),
            );
        }
        rows
    }

    /// Behind the last row of a text, or below it.
    fn put_behind(&self, rows: &mut Vec<Line<'static>>, what: String) {
        let columns = self.columns.saturating_sub(self.indent());
        match rows.last_mut() {
            Some(last) if last.width() + 2 + text::width(&what) <= columns => {
                last.spans.push(Span::styled(format!("  {what}"), DIM));
            }
            _ => rows.push(Line::styled(text::shorten(&what, columns), DIM)),
        }
    }

    /// What the rows of a text behind the first are moved in by.
    fn indent(&self) -> usize {
        if self.columns > NARROW { GUTTER } else { 2 }
    }

    /// The heading of the day that the rows put so far belong to, when what stands above them is of another one.
    fn end_day(&mut self, above: Option<Date>) {
        if let Some(day) = self.day
            && above != Some(day)
        {
            let heading = format!("── {} ──", day.strftime("%a %-d %b %Y"));
            self.reversed.push(Line::styled(text::shorten(&heading, self.columns), DIM));
        }
        self.day = above.or(self.day);
    }

    fn put(&mut self, rows: Vec<Line<'static>>) {
        self.reversed.extend(rows.into_iter().rev());
    }

    fn local(&self, time_us: u64) -> Option<jiff::Zoned> {
        let time = Timestamp::from_microsecond(i64::try_from(time_us).ok()?).ok()?;
        Some(time.to_zoned(self.zone.clone()))
    }

    fn date(&self, time_us: u64) -> Option<Date> {
        self.local(time_us).map(|time| time.date())
    }
}

const ASKED: &str = "Older messages are on their way …";
const FIRST: &str = "The chat begins here.";
const BEGINNING: &str = "What this device holds of the chat begins here.";
const DIM: Style = Style::new().add_modifier(Modifier::DIM);
const RED: Style = Style::new().fg(Color::Red);
const YELLOW: Style = Style::new().fg(Color::Yellow);
/// `12:34 ✓✓ `
const GUTTER: usize = 9;
/// A pane as narrow as this shows no times.
const NARROW: usize = 24;

#[cfg(test)]
mod tests {
    use super::super::chat::Stored;
    use super::*;

    const DAY_US: u64 = 24 * 3_600 * 1_000_000;

    fn chat() -> Chat {
        let mut chat = Chat::new("alice:bob".into(), "alice");
        let hello = "hello, this is a text of several words";
        chat.put(&Stored { id: (7, 1), sender: "bob", mine: false, time_us: 60_000_000, text: hello });
        chat.put(&Stored {
            id: (7, 2),
            sender: "alice",
            mine: true,
            time_us: DAY_US,
            text: "fine\n12:00   bob: faked",
        });
        chat.begin(1, "on its way", DAY_US + 1);
        let refused = chat.finish(1).unwrap();
        chat.fail(refused, false, "refused: NOT_A_MEMBER".to_owned());
        chat.begin(2, "still going", DAY_US + 2);
        chat
    }

    fn plain(rows: &[Line<'_>]) -> Vec<String> {
        rows.iter().map(|row| row.spans.iter().map(|span| &*span.content).collect()).collect()
    }

    #[test]
    fn a_chat_reads_from_the_top_with_days_times_and_marks() {
        let rows = plain(&last_rows(&chat(), 34, 99, &TimeZone::UTC));
        assert_eq!(
            rows,
            [
                "What this device holds of the chat",
                "begins here.",
                "── Thu 1 Jan 1970 ──",
                "00:01    bob: hello, this is a",
                "         text of several words",
                "── Fri 2 Jan 1970 ──",
                "00:00  ✓ alice: fine",
                "         12:00   bob: faked",
                "00:00  ✗ alice: on its way",
                "         refused: NOT_A_MEMBER",
                "00:00  … alice: still going",
            ]
        );
        assert_eq!(count(&chat(), 34, &TimeZone::UTC), rows.len());
        let last = plain(&last_rows(&chat(), 34, 2, &TimeZone::UTC));
        assert!(rows.ends_with(&last) && last.len() < rows.len());
    }

    #[test]
    fn marks_say_how_far_the_other_is() {
        let mut chat = chat();
        let mark = |chat: &Chat| {
            let rows = plain(&last_rows(chat, 60, 99, &TimeZone::UTC));
            rows.iter().find(|row| row.contains("alice: fine")).unwrap()[6..]
                .split(' ')
                .next()
                .unwrap()
                .to_owned()
        };
        assert_eq!(mark(&chat), "");
        chat.delivered = (8, 2);
        assert_eq!(mark(&chat), "", "of another history");
        chat.delivered = (7, 2);
        assert_eq!(mark(&chat), "✓✓");
        chat.peer_read = (7, 1);
        assert_eq!(mark(&chat), "✓✓");
        chat.peer_read = (7, 3);
        assert_eq!(mark(&chat), "●✓");
    }

    #[test]
    fn in_a_group_our_messages_say_how_many_have_them() {
        let mut chat = Chat::new("#7".into(), "alice");
        let text = "hello, all";
        chat.put(&Stored { id: (7, 2), sender: "alice", mine: true, time_us: 0, text });
        let row = |chat: &Chat, columns| {
            let rows = plain(&last_rows(chat, columns, 99, &TimeZone::UTC)).into_iter();
            rows.skip_while(|row| !row.starts_with("00:00")).collect::<Vec<_>>()
        };
        assert_eq!(row(&chat, 60), ["00:00  ✓ alice: hello, all"]);
        chat.circle.delivered("bob", (7, 2));
        assert_eq!(row(&chat, 60), ["00:00  ✓ alice: hello, all  ✓✓ 1"]);
        let member = |user: &str, read| proto::wire::Member {
            user: user.to_owned(),
            joined: 1,
            read,
            ..Default::default()
        };
        let members = vec![member("alice", 2), member("bob", 2), member("carol", 0)];
        let group = client::Group { version: 1, title: "t".to_owned(), history: 7, members };
        chat.circle.told("alice", Some(&group));
        assert_eq!(row(&chat, 60), ["00:00  ✓ alice: hello, all  ✓✓ 1/2 ●✓ 1/2"]);
        assert_eq!(row(&chat, 30), ["00:00  ✓ alice: hello, all", "         ✓✓ 1/2 ●✓ 1/2"]);
        chat.circle.delivered("carol", (7, 2));
        assert_eq!(row(&chat, 60), ["00:00 ✓✓ alice: hello, all  ✓✓ 2/2 ●✓ 1/2"]);
        chat.circle.read("carol", (7, 3));
        assert_eq!(row(&chat, 60), ["00:00 ●✓ alice: hello, all"]);
    }

    #[test]
    fn times_are_local() {
        let zone = TimeZone::fixed(jiff::tz::offset(2));
        let rows = plain(&last_rows(&chat(), 60, 99, &zone));
        assert!(rows.iter().any(|row| row.starts_with("02:01    bob:")), "{rows:?}");
    }

    #[test]
    fn a_narrow_pane_shows_texts_only() {
        let rows = plain(&last_rows(&chat(), 10, 99, &TimeZone::UTC));
        assert!(rows.iter().all(|row| text::width(row) <= 10), "{rows:?}");
        assert!(rows.contains(&"bob:".to_owned()) && rows.contains(&"  12:00  ".to_owned()), "{rows:?}");
    }
}
