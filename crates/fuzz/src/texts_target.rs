//! What people and programs write: the configuration file, requests to the API, names and
//! addresses.

use std::path::Path;

use target_daemon::config::Config;

/// No panic; what was refused says why in one line or more.
pub fn texts(data: &[u8]) {
    let Some((kind, text)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    match kind % 3 {
        0 => {
            if let Err(error) = Config::parse(Path::new("holdfastd.toml"), text) {
                assert!(!error.to_string().is_empty());
            }
        }
        1 => {
            if let Ok(request) = serde_json::from_str::<target_daemon::api::ExportRequest>(text) {
                let again = serde_json::to_string(&request).expect("it came from JSON");
                assert_eq!(
                    serde_json::from_str::<target_daemon::api::ExportRequest>(&again).ok(),
                    Some(request)
                );
            }
        }
        _ => drop(text.parse::<base::VolumeId>()),
    }
}
