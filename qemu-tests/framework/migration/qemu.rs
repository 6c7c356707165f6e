//! QEMU's side of a migration.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::PATIENCE_SECONDS;
use crate::guest::{Guest, GuestOptions};
use crate::lab::Lab;
use crate::wait::{Deadline, wait_until};

/// More than the guest's memory, in bytes a second.
pub(super) const FAST_BYTES: u64 = 1 << 30;

/// The bandwidth of a migration that something is to happen in the midst of, in bytes a second.
pub(super) const SLOW_BYTES: u64 = 4 << 20;

/// Moves a guest to a QEMU that is started for it with these options, and listens at `address`
/// (`tcp:HOST:PORT`). Also tells QEMU's downtime, in milliseconds.
pub fn move_guest(
    lab: &Lab,
    mut source: Guest,
    options: &GuestOptions,
    address: &str,
) -> Result<(Guest, f64)> {
    let mut destination = Guest::await_migration(lab, options, address)?;
    begin(&mut source, address, false, FAST_BYTES)?;
    let told = wait_for_status(&mut source, "completed")?;
    let downtime = told["downtime"].as_f64().with_context(|| format!("downtime in {told}"))?;
    wait_until_it_runs(&mut destination)?;
    destination.succeed(&source);
    source.kill()?;
    Ok((destination, downtime))
}

/// The same, slowly until `meanwhile` is done: that is while memory is copied.
pub fn move_guest_meanwhile(
    lab: &Lab,
    mut source: Guest,
    options: &GuestOptions,
    address: &str,
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<Guest> {
    let mut destination = Guest::await_migration(lab, options, address)?;
    begin(&mut source, address, false, SLOW_BYTES)?;
    wait_for_copying(&mut source, SLOW_BYTES)?;
    meanwhile()?;
    let told = ask(&mut source, "query-migrate")?;
    ensure!(told["status"] == "active", "it should go on while that happens: {told}");
    let fast = json!({ "max-bandwidth": FAST_BYTES });
    let deadline = Deadline::seconds(PATIENCE_SECONDS);
    source.qmp().execute("migrate-set-parameters", &fast, deadline)?;
    wait_for_status(&mut source, "completed")?;
    wait_until_it_runs(&mut destination)?;
    destination.succeed(&source);
    source.kill()?;
    Ok(destination)
}

/// Begins a migration to `address`. `pause`: it is to wait when the source has stopped.
pub(super) fn begin(guest: &mut Guest, address: &str, pause: bool, bandwidth: u64) -> Result<()> {
    let deadline = Deadline::seconds(PATIENCE_SECONDS);
    let qmp = guest.qmp();
    let capabilities = json!([{ "capability": "pause-before-switchover", "state": pause }]);
    let arguments = json!({ "capabilities": capabilities });
    qmp.execute("migrate-set-capabilities", &arguments, deadline)?;
    let arguments = json!({ "max-bandwidth": bandwidth });
    qmp.execute("migrate-set-parameters", &arguments, deadline)?;
    qmp.forget_events();
    qmp.execute("migrate", &json!({ "uri": address }), deadline)?;
    Ok(())
}

/// Waits until the guest's processors run.
pub(super) fn wait_until_it_runs(guest: &mut Guest) -> Result<()> {
    wait_until("the guest to run", Deadline::seconds(PATIENCE_SECONDS), || {
        guest.process().check_alive()?;
        Ok((ask(guest, "query-status")?["running"] == true).then_some(()))
    })
}

/// Waits until the migration is in this state; what QEMU tells of it then.
pub(super) fn wait_for_status(guest: &mut Guest, wanted: &str) -> Result<Value> {
    let what = format!("the migration to be {wanted}");
    wait_until(&what, Deadline::seconds(PATIENCE_SECONDS), || {
        let told = ask(guest, "query-migrate")?;
        let status = told["status"].as_str().unwrap_or_default();
        if status == wanted {
            return Ok(Some(told));
        }
        ensure!(!is_over(status), "{what}: {told}");
        Ok(None)
    })
}

/// Waits until so many bytes of memory were copied.
pub(super) fn wait_for_copying(guest: &mut Guest, bytes: u64) -> Result<()> {
    wait_until("memory to be copied", Deadline::seconds(PATIENCE_SECONDS), || {
        let told = ask(guest, "query-migrate")?;
        let status = told["status"].as_str().unwrap_or_default();
        if is_over(status) {
            bail!("the migration is over before it was given up: {told}");
        }
        let copied = told["ram"]["transferred"].as_u64().unwrap_or(0);
        Ok((status == "active" && copied > bytes).then_some(()))
    })
}

fn is_over(status: &str) -> bool {
    ["completed", "failed", "cancelled"].contains(&status)
}

/// Runs a command of QEMU's without arguments.
pub(super) fn ask(guest: &mut Guest, command: &str) -> Result<Value> {
    guest.qmp().execute(command, &json!({}), Deadline::seconds(PATIENCE_SECONDS))
}
