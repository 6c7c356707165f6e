//! `holdfast volume resize`

use std::time::{Duration, Instant};

use cluster::resize::resize as resize_record;
use cluster::{ClusterStore, Create, VolumeEntry, unix_ms, volumes};
use serde::Serialize;
use target_daemon::size::format_size;

use crate::arguments::{ResizeArguments, StoreArgument};
use crate::exit::{Exit, Failure};
use crate::output::Output;

/// How long one look at the store waits. Statuses are no news for its revision.
const TURN: Duration = Duration::from_millis(100);

/// The JSON of `volume resize`.
#[derive(Serialize)]
struct ResizedView {
    /// UUID.
    id: String,
    name: String,
    size_bytes: u64,
    previous_size_bytes: u64,
    /// `unchanged` (it had that size), `resized` (nobody serves it), `served` (its guests have it),
    /// `telling` (it was not waited for).
    state: &'static str,
}

pub(crate) fn resize(
    store: &StoreArgument,
    arguments: &ResizeArguments,
    output: &Output,
) -> Result<(), Failure> {
    let store = cluster::open(store.address()?, Create::Never)?;
    let id = volumes::find(store.as_ref(), &arguments.volume)?.volume.id;
    let resized = resize_record(store.as_ref(), id, arguments.size)?;
    let size_bytes = resized.entry.volume.size_bytes;
    let state = if resized.before_bytes == size_bytes && arguments.wait == 0 {
        "unchanged"
    } else {
        wait_until_served(store.as_ref(), resized.entry.clone(), arguments.wait, output)?
    };
    let unchanged = resized.before_bytes == size_bytes;
    let view = ResizedView {
        id: id.to_string(),
        name: resized.entry.volume.name,
        size_bytes,
        previous_size_bytes: resized.before_bytes,
        state: if unchanged { "unchanged" } else { state },
    };
    output.print(&view, || {
        let (name, size) = (&view.name, format_size(view.size_bytes));
        match view.state {
            "unchanged" => format!("volume {name} has {size} already"),
            "served" => format!("volume {name} has {size} now, and its guests were told"),
            "telling" => format!("volume {name} has {size} now; whoever serves it is being told"),
            _ => format!("volume {name} has {size} now"),
        }
    });
    Ok(())
}

/// Waits until the volume's holder serves its size, if somebody holds it.
fn wait_until_served(
    store: &dyn ClusterStore,
    mut entry: VolumeEntry,
    wait_seconds: u64,
    output: &Output,
) -> Result<&'static str, Failure> {
    let (start, wait) = (Instant::now(), Duration::from_secs(wait_seconds));
    loop {
        let Some(holder) = &entry.volume.holder else { return Ok("resized") };
        let told = store.statuses()?.into_iter().any(|status| {
            status.is_current(&entry, unix_ms()) && status.size_bytes >= entry.volume.size_bytes
        });
        if told {
            output.progress("");
            return Ok("served");
        }
        if wait.is_zero() {
            return Ok("telling");
        }
        if start.elapsed() >= wait {
            output.progress("");
            let text = format!(
                "volume '{name}' was resized, but {holder}, which serves it, does not say after \
                 {wait_seconds} s that its guests have the new size: a write quorum of its members \
                 must have it first (`holdfast volume show {name}` says how they are); nothing \
                 need be repeated",
                name = entry.volume.name,
                holder = holder.name,
            );
            return Err(Failure::new(Exit::NotReady, text));
        }
        output.progress(&format!("{} tells the members of the new size", holder.name));
        std::thread::sleep(TURN);
        let current = store.volume(entry.volume.id)?.filter(|current| !current.deleted);
        entry = current.ok_or_else(|| {
            let text = format!("volume '{}' was deleted meanwhile", entry.volume.name);
            Failure::new(Exit::Conflict, text)
        })?;
    }
}
