//! QEMU's control socket (QMP): commands, their answers, and events.

use std::collections::VecDeque;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::lines::Lines;
use crate::wait::Deadline;

/// A connection in command mode.
#[derive(Debug)]
pub struct Qmp {
    lines: Lines,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects and leaves negotiation mode.
    pub(crate) fn connect(
        path: &Path,
        deadline: Deadline,
        alive: impl FnMut() -> Result<()>,
    ) -> Result<Self> {
        let lines = Lines::connect(path, deadline, alive)?;
        let mut qmp = Self { lines, events: VecDeque::new() };
        let greeting = qmp.next(deadline)?.context("QEMU's greeting did not come")?;
        if greeting.get("QMP").is_none() {
            bail!("not a QMP greeting: {greeting}");
        }
        qmp.execute("qmp_capabilities", &json!({}), deadline)?;
        Ok(qmp)
    }

    /// Runs a command and returns what it returned.
    pub fn execute(
        &mut self,
        command: &str,
        arguments: &Value,
        deadline: Deadline,
    ) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.lines.send(&request.to_string(), deadline)?;
        loop {
            let message = self.next(deadline)?;
            let mut message = message.with_context(|| format!("no answer to {command}"))?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(error) = message.get("error") {
                bail!("{command} failed: {error}");
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// The next event with this name for which `matches` holds; earlier ones are dropped.
    pub fn event(
        &mut self,
        name: &str,
        deadline: Deadline,
        matches: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => match self.next(deadline)? {
                    Some(event) => event,
                    None => bail!("waited in vain for QEMU's event {name}"),
                },
            };
            if event["event"] == name && matches(&event["data"]) {
                return Ok(event);
            }
        }
    }

    /// Forgets the events that came so far.
    pub(crate) fn forget_events(&mut self) {
        self.events.clear();
    }

    fn next(&mut self, deadline: Deadline) -> Result<Option<Value>> {
        let Some(line) = self.lines.next(deadline)? else { return Ok(None) };
        serde_json::from_str(&line).map(Some).with_context(|| format!("not JSON: {line}"))
    }
}
