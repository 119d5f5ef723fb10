//! The way down to the workers: an inbox each, and what waits for room in one. On the bridge's thread.
//!
//! A worker that is late (not scheduled, or busy writing) must not hold up the others: what finds its inbox full is put
//! beside it, up to one bound of bytes for all, and follows in order as soon as there is room.
//!
//! Trap: the order is say, then look. `starved` is set before the last try, so that room made in between is seen, and
//! room made later wakes us.

use std::collections::VecDeque;

use crossbeam_channel::{Sender, TrySendError};
use parking_lot::Mutex;

use crate::batch::{Down, DownItem};
use crate::wake::{Starved, Wake};

/// One worker's inbox, as the bridge sees it.
pub struct Outbox {
    /// Batches down.
    pub down: Sender<Down>,
    /// Wakes the worker.
    pub wake: Wake,
    /// Set while the bridge waits for room in `down`.
    pub starved: Starved,
}

/// All of them.
pub struct Outboxes {
    workers: Vec<Outbox>,
    late: Mutex<Late>,
    late_bytes_max: usize,
}

/// What found no room, per worker.
struct Late {
    queues: Vec<VecDeque<(Down, usize)>>,
    count: usize,
    bytes: usize,
}

impl Outboxes {
    /// Over the workers' inboxes.
    pub fn new(workers: Vec<Outbox>, late_bytes_max: usize) -> Self {
        let queues = workers.iter().map(|_| VecDeque::new()).collect();
        Outboxes { workers, late: Mutex::new(Late { queues, count: 0, bytes: 0 }), late_bytes_max }
    }

    /// How many workers there are.
    pub fn len(&self) -> usize {
        self.workers.len()
    }

    /// Sends behind everything that was sent to this worker before. Given back: too much waits already; room wakes the
    /// bridge.
    pub fn send(&self, worker: usize, down: Down) -> Result<(), Down> {
        let outbox = &self.workers[worker];
        let mut late = self.late.lock();
        let Some(down) = late.pass(worker, outbox, down) else { return Ok(()) };
        outbox.starved.say();
        late.flush(worker, outbox);
        let Some(down) = late.pass(worker, outbox, down) else { return Ok(()) };
        outbox.wake.wake();
        let bytes = bytes_of(&down);
        if late.bytes + bytes > self.late_bytes_max {
            return Err(down);
        }
        late.queues[worker].push_back((down, bytes));
        late.count += 1;
        late.bytes += bytes;
        Ok(())
    }

    /// Somebody has room again: passes on what waits, as far as it goes.
    pub fn flush(&self) {
        let mut late = self.late.lock();
        if late.count == 0 {
            return;
        }
        for (worker, outbox) in self.workers.iter().enumerate() {
            late.flush(worker, outbox);
            if !late.queues[worker].is_empty() {
                outbox.starved.say();
                late.flush(worker, outbox);
                outbox.wake.wake();
            }
        }
    }

    /// Bytes that wait beside full inboxes.
    pub fn late_bytes(&self) -> usize {
        self.late.lock().bytes
    }
}

impl Late {
    /// Sends if nothing waits in front of it and there is room, else gives it back.
    fn pass(&self, worker: usize, outbox: &Outbox, down: Down) -> Option<Down> {
        if !self.queues[worker].is_empty() {
            return Some(down);
        }
        match outbox.down.try_send(down) {
            Ok(()) => {
                outbox.wake.wake();
                None
            }
            // The worker has ended, and its connections with it.
            Err(TrySendError::Disconnected(_)) => None,
            Err(TrySendError::Full(back)) => Some(back),
        }
    }

    fn flush(&mut self, worker: usize, outbox: &Outbox) {
        let mut sent = false;
        while let Some((down, bytes)) = self.queues[worker].pop_front() {
            match outbox.down.try_send(down) {
                Err(TrySendError::Full(back)) => {
                    self.queues[worker].push_front((back, bytes));
                    break;
                }
                Ok(()) => sent = true,
                Err(TrySendError::Disconnected(_)) => {}
            }
            self.count -= 1;
            self.bytes -= bytes;
        }
        if self.queues[worker].is_empty() {
            self.queues[worker] = VecDeque::new();
        }
        if sent {
            outbox.wake.wake();
        }
    }
}

/// About what it takes in memory.
fn bytes_of(down: &Down) -> usize {
    match down {
        Down::Batch { items, .. } => {
            items.iter().map(|item| item.frames.len()).sum::<usize>() + items.len() * size_of::<DownItem>()
        }
        Down::Drain { .. } | Down::Resync | Down::Stop => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Ticket;
    use crate::sys::EventFd;
    use crossbeam_channel::{Receiver, bounded};

    fn outboxes(late_bytes_max: usize) -> (Outboxes, Vec<Receiver<Down>>) {
        let mut receivers = Vec::new();
        let workers = (0..2).map(|_| {
            let (down, receiver) = bounded(2);
            receivers.push(receiver);
            Outbox { down, wake: Wake::new(EventFd::new().unwrap()), starved: Starved::new() }
        });
        let workers = workers.collect();
        (Outboxes::new(workers, late_bytes_max), receivers)
    }

    fn batch(number: u64, items: usize) -> Down {
        let item = |_| DownItem { connection: 1, user: 1, ..DownItem::default() };
        let ticket = Ticket { stream: 1, number, awaited: false };
        Down::Batch { items: (0..items).map(item).collect(), ticket: Some(ticket) }
    }

    fn number(down: Down) -> u64 {
        match down {
            Down::Batch { ticket: Some(ticket), .. } => ticket.number,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_late_worker_holds_nobody_up_and_keeps_the_order() {
        let (outboxes, receivers) = outboxes(10_000);
        for n in 0..5 {
            assert!(outboxes.send(0, batch(n, 1)).is_ok());
        }
        assert!(outboxes.workers[0].starved.take());
        assert!(outboxes.send(1, batch(9, 1)).is_ok());
        assert_eq!((number(receivers[1].recv().unwrap()), outboxes.late.lock().count), (9, 3));
        let mut got = Vec::new();
        while let Ok(down) = receivers[0].try_recv() {
            got.push(number(down));
            outboxes.flush();
        }
        assert_eq!(got, [0, 1, 2, 3, 4]);
        assert_eq!((outboxes.late_bytes(), outboxes.late.lock().count), (0, 0));
    }

    #[test]
    fn what_waits_is_bounded_and_a_stop_is_not_forgotten() {
        let (outboxes, receivers) = outboxes(3 * size_of::<DownItem>());
        let sent = (0..9).filter(|n| outboxes.send(0, batch(*n, 1)).is_ok()).count();
        assert_eq!(sent, 2 + 3);
        assert!(outboxes.send(0, Down::Stop).is_ok());
        assert!(outboxes.send(1, batch(0, 1)).is_ok(), "the other worker's inbox has room");
        drop(receivers);
        outboxes.flush();
        assert_eq!((outboxes.late_bytes(), outboxes.late.lock().count), (0, 0));
    }
}
