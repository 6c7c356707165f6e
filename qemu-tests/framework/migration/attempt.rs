//! One migration: that goes through, or is given up at some step.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::qemu::{self, FAST_BYTES, SLOW_BYTES};
use super::trace::{self, GET_VRING_BASE, SET_LOG_BASE};
use super::{BackEnd, PATIENCE_SECONDS, Rig, guest_options, own};
use crate::guest::Guest;
use crate::machine::Stretch;
use crate::wait::{Deadline, wait_until};

/// Where destinations listen, each at another port.
const FIRST_PORT: u16 = 5000;
const PORTS: u16 = 10_000;

/// How long the guest is watched before it moves, and after.
const WATCH: Duration = Duration::from_secs(1);

/// When a migration is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Cancelled as soon as the back end has been told to log what it writes.
    Logging,
    /// Cancelled while memory is copied.
    Copying,
    /// Cancelled after the source's rings have stopped.
    Stopped,
    /// The destination is killed while memory is copied.
    KilledCopying,
    /// The destination is killed after the source's rings have stopped, and then told to go on.
    KilledStopped,
    /// The destination has got everything, and is killed before it starts its rings.
    KilledMoved,
}

/// What a guest felt when it moved.
#[derive(Debug, Clone, Copy)]
pub struct Move {
    /// What storage added to QEMU's own downtime, in milliseconds: `drain_ms` and `gap_ms`.
    pub added_ms: f64,
    /// How long the source's back end took to stop the rings. QEMU's downtime has it, too.
    pub drain_ms: f64,
    /// Holdfast's own part after that, by the destination's back end's clock: from when the first ring
    /// started there until the volume was open, and what the first request took then.
    pub own_ms: f64,
    /// When these two were.
    pub own: [Stretch; 2],
    /// Of that, until the lease was had.
    pub lease_ms: f64,
    /// And until the volume was open.
    pub opened_ms: f64,
    /// The longest time without an answer from when the guest was stopped until a second after, by the
    /// guest's clock, which stands still while the guest is stopped.
    pub gap_ms: f64,
    /// The same for the second before the migration.
    pub quiet_ms: f64,
    /// QEMU's downtime.
    pub downtime_ms: f64,
    /// The slowest request while all this went on, by the guest's clock.
    pub slowest_ms: f64,
    /// How long all of it took.
    pub total_ms: f64,
}

impl Step {
    /// All of them, in the order of a migration.
    pub const ALL: [Self; 6] = [
        Self::Logging,
        Self::Copying,
        Self::KilledCopying,
        Self::Stopped,
        Self::KilledStopped,
        Self::KilledMoved,
    ];

    /// For what is printed.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Logging => "cancelled when logging begins",
            Self::Copying => "cancelled while copying",
            Self::Stopped => "cancelled after the source stopped",
            Self::KilledCopying => "destination killed while copying",
            Self::KilledStopped => "destination killed after the source stopped",
            Self::KilledMoved => "destination killed after it got everything",
        }
    }

    const fn needs_pause(self) -> bool {
        match self {
            Self::Stopped | Self::KilledStopped => true,
            Self::Logging | Self::Copying | Self::KilledCopying | Self::KilledMoved => false,
        }
    }

    const fn bandwidth(self) -> u64 {
        match self {
            Self::Logging | Self::Copying | Self::KilledCopying => SLOW_BYTES,
            Self::Stopped | Self::KilledStopped | Self::KilledMoved => FAST_BYTES,
        }
    }
}

/// A migration under way.
struct Attempt {
    destination: Guest,
    /// How long the source's trace was before.
    trace_from: u64,
}

impl Rig<'_> {
    /// Moves the guest to the other host.
    pub fn migrate(&mut self) -> Result<Move> {
        let quiet = self.quiet()?;
        let there = 1 - self.here;
        let said_before = self.said(there)?.len();
        let clocks = self.writer.clocks(&mut self.guest)?;
        self.writer.begin(&mut self.guest)?;
        let attempt = self.begin(false, FAST_BYTES, false)?;
        let told = self.wait_for_status("completed")?;
        let deadline = Deadline::seconds(PATIENCE_SECONDS);
        let stopped = self.guest.qmp().event("STOP", deadline, |_| true)?;
        let said = trace::messages(self.guest.trace(), attempt.trace_from)?;
        let drain = trace::time_to_answer(&said, GET_VRING_BASE);
        self.arrive(attempt.destination)?;

        let (waited, answered) = match self.hosts[there].back_end {
            Some(BackEnd::Bare(_)) => (own::Waited::default(), Instant::now()),
            Some(BackEnd::Attached(_)) | None => own::wait_for(|| self.said(there), said_before)?,
        };
        let stopped = clocks.guest_at(timestamp(&stopped)?);
        // The clock stood already while the rings were drained.
        let error = clocks.error + drain + Duration::from_millis(2);
        let seen = self.seen_until(stopped + WATCH)?;
        let gap = seen.longest_between(stopped.saturating_sub(error), stopped + WATCH);
        let number = |name: &str| told[name].as_f64().with_context(|| format!("{name} in {told}"));
        Ok(Move {
            added_ms: milliseconds(drain + gap),
            drain_ms: milliseconds(drain),
            own_ms: milliseconds(waited.own()),
            own: waited.own_at(answered),
            lease_ms: milliseconds(waited.lease),
            opened_ms: milliseconds(waited.opened),
            gap_ms: milliseconds(gap),
            quiet_ms: milliseconds(quiet),
            downtime_ms: number("downtime")?,
            slowest_ms: milliseconds(seen.slowest),
            total_ms: number("total-time")?,
        })
    }

    /// Moves the guest to the other host, whatever it feels there.
    pub fn migrate_blindly(&mut self) -> Result<()> {
        let attempt = self.begin(false, FAST_BYTES, false)?;
        self.wait_for_status("completed")?;
        self.arrive(attempt.destination)
    }

    /// Begins to move the guest to the other host and gives up: the guest goes on where it is.
    pub fn give_up_at(&mut self, step: Step) -> Result<()> {
        self.abort_at(step)?;
        self.calm().map(|_seen| ())
    }

    /// The same, without waiting for the guest to get on.
    pub fn abort_at(&mut self, step: Step) -> Result<()> {
        let paused = step == Step::KilledMoved;
        let mut attempt = self.begin(step.needs_pause(), step.bandwidth(), paused)?;
        match step {
            Step::Logging => {
                let trace = self.guest.trace().to_owned();
                wait_until("the log of dirty pages", Deadline::seconds(PATIENCE_SECONDS), || {
                    let said = trace::messages(&trace, attempt.trace_from)?;
                    let asked = said.iter().any(|message| message.request == SET_LOG_BASE);
                    Ok(asked.then_some(()))
                })?;
                self.cancel()?;
            }
            Step::Copying => {
                qemu::wait_for_copying(&mut self.guest, SLOW_BYTES)?;
                self.cancel()?;
            }
            Step::Stopped => {
                self.wait_for_status("pre-switchover")?;
                self.cancel()?;
            }
            Step::KilledCopying => {
                qemu::wait_for_copying(&mut self.guest, SLOW_BYTES)?;
                attempt.destination.kill()?;
                self.wait_for_status("failed")?;
            }
            Step::KilledStopped => {
                self.wait_for_status("pre-switchover")?;
                attempt.destination.kill()?;
                let deadline = Deadline::seconds(PATIENCE_SECONDS);
                let arguments = json!({ "state": "pre-switchover" });
                // It may have noticed already.
                let outcome = self.guest.qmp().execute("migrate-continue", &arguments, deadline);
                self.wait_for_status("failed").with_context(|| format!("{outcome:?}"))?;
            }
            Step::KilledMoved => {
                self.wait_for_status("completed")?;
                attempt.destination.kill()?;
            }
        }
        drop(attempt);
        self.resume()
    }

    /// Lets the guest go on where it is, after a migration that came to nothing.
    fn resume(&mut self) -> Result<()> {
        if qemu::ask(&mut self.guest, "query-status")?["status"] == "postmigrate" {
            // QEMU believes that it was successful.
            qemu::ask(&mut self.guest, "cont")?;
        }
        qemu::wait_until_it_runs(&mut self.guest)
    }

    /// Starts the other QEMU and lets the migration begin.
    fn begin(&mut self, pause: bool, bandwidth: u64, paused: bool) -> Result<Attempt> {
        let there = &self.hosts[1 - self.here];
        let number = self.launched;
        self.launched += 1;
        let address = format!("tcp:{}:{}", there.address, FIRST_PORT + number % PORTS);
        let mut options = guest_options(there, number, self.limit);
        options.makes_way = self.guests_make_way;
        options.paused = paused;
        let destination = Guest::await_migration(self.lab, &options, &address)?;
        let trace_from = trace::length(self.guest.trace())?;
        qemu::begin(&mut self.guest, &address, pause, bandwidth)?;
        Ok(Attempt { destination, trace_from })
    }

    /// The guest is at the destination now.
    fn arrive(&mut self, mut destination: Guest) -> Result<()> {
        qemu::wait_until_it_runs(&mut destination)?;
        destination.succeed(&self.guest);
        let mut source = std::mem::replace(&mut self.guest, destination);
        self.here = 1 - self.here;
        source.kill()
    }

    fn cancel(&mut self) -> Result<()> {
        qemu::ask(&mut self.guest, "migrate_cancel")?;
        self.wait_for_status("cancelled").map(|_told| ())
    }

    fn wait_for_status(&mut self, wanted: &str) -> Result<Value> {
        qemu::wait_for_status(&mut self.guest, wanted)
    }

    /// The longest time without an answer in a second in which nothing happens.
    fn quiet(&mut self) -> Result<Duration> {
        self.writer.begin(&mut self.guest)?;
        let from = self.writer.clocks(&mut self.guest)?.guest_at(crate::writer::wall_clock());
        let seen = self.seen_until(from + WATCH)?;
        Ok(seen.longest_between(from, from + WATCH))
    }

    /// What the guest has seen when its clock has come to `moment`.
    fn seen_until(&mut self, moment: Duration) -> Result<crate::writer::Seen> {
        // Not a wait for anything, and asking costs the guest time: look when it is over.
        std::thread::sleep(WATCH);
        wait_until("the guest's clock", Deadline::seconds(PATIENCE_SECONDS), || {
            let seen = self.writer.seen(&mut self.guest)?;
            Ok((seen.now >= moment).then_some(seen))
        })
    }
}

/// The wall clock of one of QEMU's events.
fn timestamp(event: &Value) -> Result<Duration> {
    let part = |name: &str| event["timestamp"][name].as_u64().context("an event's timestamp");
    Ok(Duration::from_secs(part("seconds")?) + Duration::from_micros(part("microseconds")?))
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
