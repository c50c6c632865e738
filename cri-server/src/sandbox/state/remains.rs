//! What a sandbox that could not be made has left, because undoing it failed too. It is listed as NOTREADY, so that clients may stop
//! and remove it, and is given back again by itself, later each time, until nothing of it is left.

use std::time::{Duration, Instant};

use super::{Goal, Lifecycle, Machine, Outbox, Rest, answer_all};

/// The first pause before the next try: plugins fail for as long as their daemon restarts.
const FIRST: Duration = Duration::from_secs(2);
/// The longest one: what has failed for some minutes waits for a person.
const LONGEST: Duration = Duration::from_secs(60);

/// When the next try is due.
pub(super) struct Again {
    pause: Duration,
    at: Instant,
}

impl Again {
    pub(super) fn first(now: Instant) -> Self {
        Self { pause: FIRST * 2, at: now + FIRST }
    }

    fn later(&mut self, now: Instant) {
        self.at = now + self.pause;
        self.pause = (self.pause * 2).min(LONGEST);
    }
}

impl Machine {
    /// It could not be made.
    pub(super) fn not_made(&mut self, rest: Rest, now: Instant, out: &mut Outbox) {
        self.lifecycle = match rest {
            Rest::Nothing => {
                answer_all(out, &mut self.stoppers, &Ok(()));
                answer_all(out, &mut self.removers, &Ok(()));
                Lifecycle::Over
            }
            Rest::Folders => Lifecycle::NotReady(None),
            Rest::Held(live) => Lifecycle::NotReady(Some(live)),
        };
        if !self.over() {
            self.remains = Some(Again::first(now));
            self.not_ready_because = "it could not be made, and what it has left could not be given back yet".to_owned();
        }
    }

    /// Whether it could not be made, and something of it is left.
    pub(crate) fn remains(&self) -> bool {
        self.remains.is_some()
    }

    /// Whether it was made once: plugins have heard of it, and its record says so until the last.
    pub(super) fn is_told(&self) -> bool {
        !self.hidden && self.remains.is_none()
    }

    /// When what is left is given back again by itself.
    pub(crate) fn undo_again(&self) -> Option<Instant> {
        let idle = self.goal == Goal::Run && matches!(self.lifecycle, Lifecycle::NotReady(_));
        self.remains.as_ref().filter(|_| idle).map(|again| again.at)
    }

    /// A try has ended and the sandbox is still there: now it is for everybody to see.
    pub(super) fn still_there(&mut self, now: Instant) {
        if let Some(again) = &mut self.remains {
            again.later(now);
            if self.goal == Goal::Run {
                self.hidden = false;
            }
        }
    }

    /// Begins the next try when it is due.
    pub(super) fn undo_what_is_left(&mut self, now: Instant) {
        if self.undo_again().is_some_and(|at| at <= now) {
            self.goal = Goal::Remove;
        }
    }
}
