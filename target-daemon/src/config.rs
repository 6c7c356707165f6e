//! The daemon's configuration: a TOML file, checked whole before anything of it is used.
//!
//! A file that is not TOML, or has a key that is not known, is refused at the place of the first
//! such fault; everything else that is wrong is reported at once, each with its line.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use base::limits::VOLUMES_MAX;
use cluster::{StoreAddress, check_name};
use serde::{Deserialize, Serialize};
use shell::control::PoolDevices;
use toml::Spanned;

use crate::healer::HealSettings;
use crate::logging::{LogFormat, LogLevel};
use crate::size::parse_size;
use crate::socket::check_path;

/// Payload memory if the configuration does not say, in bytes.
const BUFFER_BYTES_DEFAULT: u64 = 128 << 20;
/// The least payload memory that a daemon works with, in bytes.
const BUFFER_BYTES_MIN: u64 = 16 << 20;
/// The most payload memory that a configuration may ask for, in bytes.
const BUFFER_BYTES_MAX: u64 = 64 << 30;
/// How fast home is read for rot if the configuration does not say, in bytes per second: a terabyte
/// in six days.
const SCRUB_DEFAULT: u64 = 2 << 20;
/// The fastest that it may be asked for.
const SCRUB_MAX: u64 = 1 << 30;
/// Request queues of an export if the configuration does not say.
pub const QUEUES_DEFAULT: u16 = 4;
/// How long a member must have been silent before it is replaced, in milliseconds.
const HEAL_DELAY_MS: std::ops::RangeInclusive<u64> = 100..=86_400_000;
/// The most request queues of an export.
pub const QUEUES_MAX: u16 = 64;

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The server's name, as its pool was formatted with.
    pub name: String,
    /// The cluster store.
    pub store: StoreAddress,
    /// The pool's devices.
    pub pool: PoolDevices,
    /// Where the replica service listens.
    pub listen: SocketAddr,
    /// Where others reach it; `None`: where it listens.
    pub advertise: Option<SocketAddr>,
    /// The API's Unix socket.
    pub api: PathBuf,
    /// Free-form facts about the server.
    pub labels: BTreeMap<String, String>,
    /// What is logged.
    pub log_level: LogLevel,
    /// How it is logged.
    pub log_format: LogFormat,
    /// Payload memory, in bytes.
    pub buffer_bytes: u64,
    /// Home is read for rot at this rate, at most; 0: not at all. In bytes per second.
    pub scrub_bytes_per_second: u64,
    /// Volumes to serve from the start.
    pub exports: Vec<ExportConfig>,
    /// How lost members are replaced.
    pub heal: HealSettings,
    /// Heads are told what happens. Only tests that show the gap without it turn it off.
    pub state_messages: bool,
}

/// A volume to serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportConfig {
    /// The volume's name or id.
    pub volume: String,
    /// The socket to serve it on.
    pub socket: PathBuf,
    /// Request queues.
    pub queues: u16,
    /// The guest sees a read-only disk.
    pub read_only: bool,
    /// The lease is taken when the guest starts its rings, not when the export starts: for the
    /// destination of a live migration.
    #[serde(default)]
    pub standby: bool,
}

/// Everything that is wrong with a configuration.
#[derive(Debug)]
pub struct ConfigError {
    path: PathBuf,
    problems: Vec<Problem>,
}

#[derive(Debug)]
struct Problem {
    /// Counted from 1; 0: of the file as a whole.
    line: usize,
    text: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            match problem.line {
                0 => write!(f, "{}: {}", self.path.display(), problem.text)?,
                line => write!(f, "{}:{line}: {}", self.path.display(), problem.text)?,
            }
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    name: Spanned<String>,
    store: Spanned<String>,
    pool: RawPool,
    listen: Spanned<String>,
    advertise: Option<Spanned<String>>,
    api: Spanned<PathBuf>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    log: RawLog,
    #[serde(default)]
    limits: RawLimits,
    #[serde(default)]
    exports: Vec<RawExport>,
    #[serde(default)]
    heal: RawHeal,
    #[serde(default)]
    test: RawTest,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPool {
    fast: Spanned<Vec<Spanned<PathBuf>>>,
    #[serde(default)]
    mass: Vec<Spanned<PathBuf>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLog {
    #[serde(default)]
    level: LogLevel,
    #[serde(default)]
    format: LogFormat,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLimits {
    buffers: Option<Spanned<String>>,
    scrub: Option<Spanned<String>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTest {
    state_messages: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHeal {
    delay_ms: Option<Spanned<u64>>,
    fills_max: Option<Spanned<usize>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawExport {
    volume: Spanned<String>,
    socket: Spanned<PathBuf>,
    queues: Option<Spanned<u16>>,
    #[serde(default)]
    read_only: bool,
    #[serde(default)]
    standby: bool,
}

impl Config {
    /// Reads and checks the file at `path`.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|error| ConfigError {
            path: path.to_owned(),
            problems: vec![Problem { line: 0, text: format!("cannot read it: {error}") }],
        })?;
        Self::parse(path, &text)
    }

    /// Checks the configuration `text`, which came from `path`.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let fail = |problems| ConfigError { path: path.to_owned(), problems };
        let raw: RawConfig = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(0, |span| line_of(text, span.start));
            fail(vec![Problem { line, text: error.message().to_owned() }])
        })?;
        let mut check = Check { text, problems: Vec::new() };
        let config = check.config(raw);
        match config {
            Some(config) if check.problems.is_empty() => Ok(config),
            Some(_) | None => Err(fail(check.problems)),
        }
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

struct Check<'a> {
    text: &'a str,
    problems: Vec<Problem>,
}

impl Check<'_> {
    fn problem<T>(&mut self, at: &Spanned<T>, text: String) {
        self.problems.push(Problem { line: line_of(self.text, at.span().start), text });
    }

    /// `None` if something is wrong that leaves no value; the problems say what.
    fn config(&mut self, raw: RawConfig) -> Option<Config> {
        if let Err(error) = check_name(raw.name.get_ref()) {
            self.problem(&raw.name, format!("name: {error}"));
        }
        let store = match raw.store.get_ref().parse() {
            Ok(address) => Some(address),
            Err(error) => {
                self.problem(&raw.store, format!("store: {error}"));
                None
            }
        };
        let (listen, advertise) = self.addresses(&raw.listen, raw.advertise.as_ref());
        if let Err(reason) = check_path(raw.api.get_ref()) {
            self.problem(&raw.api, format!("api: {reason}"));
        }
        let pool = self.pool(raw.pool);
        let buffer_bytes = self.buffers(raw.limits.buffers.as_ref());
        let scrub_bytes_per_second = self.scrub(raw.limits.scrub.as_ref());
        let exports = self.exports(raw.exports, raw.api.get_ref());
        let heal = self.heal(&raw.heal);
        Some(Config {
            name: raw.name.into_inner(),
            store: store?,
            pool,
            listen: listen?,
            advertise,
            api: raw.api.into_inner(),
            labels: raw.labels,
            log_level: raw.log.level,
            log_format: raw.log.format,
            buffer_bytes,
            scrub_bytes_per_second,
            exports,
            heal,
            state_messages: raw.test.state_messages.unwrap_or(true),
        })
    }

    fn addresses(
        &mut self,
        listen: &Spanned<String>,
        advertise: Option<&Spanned<String>>,
    ) -> (Option<SocketAddr>, Option<SocketAddr>) {
        let mut parse = |key: &str, value: &Spanned<String>| {
            let text = value.get_ref();
            let address = text.parse().ok();
            if address.is_none() {
                let advice = "write it as 192.0.2.1:4420 or [2001:db8::1]:4420";
                let text = format!("{key}: '{text}' is not an IP address and port; {advice}");
                self.problem(value, text);
            }
            address
        };
        let own: Option<SocketAddr> = parse("listen", listen);
        let told: Option<SocketAddr> = advertise.and_then(|value| parse("advertise", value));
        if let (Some(told), Some(at)) = (told, advertise)
            && (told.ip().is_unspecified() || told.port() == 0)
        {
            self.problem(at, format!("advertise: nobody can connect to {told}; name one address"));
        }
        if own.is_some_and(|own| own.ip().is_unspecified()) && advertise.is_none() {
            let text = "listen: with an address that means all, `advertise` must say where other \
                        servers reach this one"
                .to_owned();
            self.problem(listen, text);
        }
        (own, told)
    }

    fn pool(&mut self, raw: RawPool) -> PoolDevices {
        if raw.fast.get_ref().is_empty() {
            self.problem(&raw.fast, "pool.fast: name at least one device or file".to_owned());
        }
        let mut seen = BTreeSet::new();
        for device in raw.fast.get_ref().iter().chain(&raw.mass) {
            let path = device.get_ref();
            if !path.is_absolute() {
                let text = format!("pool: '{}' is not an absolute path", path.display());
                self.problem(device, text);
            }
            if !seen.insert(path.clone()) {
                self.problem(device, format!("pool: '{}' is named twice", path.display()));
            }
        }
        PoolDevices {
            fast: raw.fast.into_inner().into_iter().map(Spanned::into_inner).collect(),
            mass: raw.mass.into_iter().map(Spanned::into_inner).collect(),
        }
    }

    fn buffers(&mut self, raw: Option<&Spanned<String>>) -> u64 {
        let Some(raw) = raw else { return BUFFER_BYTES_DEFAULT };
        match parse_size(raw.get_ref()) {
            Ok(bytes) if (BUFFER_BYTES_MIN..=BUFFER_BYTES_MAX).contains(&bytes) => return bytes,
            Ok(_) => self.problem(raw, "limits.buffers: it must be 16M to 64G".to_owned()),
            Err(error) => self.problem(raw, format!("limits.buffers: {error}")),
        }
        BUFFER_BYTES_DEFAULT
    }

    fn scrub(&mut self, raw: Option<&Spanned<String>>) -> u64 {
        let Some(raw) = raw else { return SCRUB_DEFAULT };
        if raw.get_ref() == "off" {
            return 0;
        }
        match parse_size(raw.get_ref()) {
            Ok(bytes) if (1..=SCRUB_MAX).contains(&bytes) => return bytes,
            Ok(_) => {
                let text = "limits.scrub: it must be at most 1G (per second), or \"off\"";
                self.problem(raw, text.to_owned());
            }
            Err(error) => self.problem(raw, format!("limits.scrub: {error}")),
        }
        SCRUB_DEFAULT
    }

    fn heal(&mut self, raw: &RawHeal) -> HealSettings {
        let mut settings = HealSettings::default();
        if let Some(delay) = &raw.delay_ms {
            settings.delay_ms = *delay.get_ref();
            if !HEAL_DELAY_MS.contains(&settings.delay_ms) {
                let (least, most) = (HEAL_DELAY_MS.start(), HEAL_DELAY_MS.end());
                self.problem(delay, format!("heal.delay_ms: it must be {least} to {most}"));
            }
        }
        if let Some(fills) = &raw.fills_max {
            settings.fills_max = *fills.get_ref();
            if settings.fills_max == 0 {
                let text = "heal.fills_max: it must be at least 1, or nothing is healed";
                self.problem(fills, text.to_owned());
            }
        }
        settings
    }

    fn exports(&mut self, raw: Vec<RawExport>, api: &Path) -> Vec<ExportConfig> {
        if let Some(first) = raw.first()
            && raw.len() > VOLUMES_MAX
        {
            let text = format!("exports: one daemon serves at most {VOLUMES_MAX} volumes");
            self.problem(&first.volume, text);
        }
        let mut sockets = BTreeSet::from([api.to_owned()]);
        let mut exports = Vec::new();
        for export in raw {
            let socket = export.socket.get_ref();
            if let Err(reason) = check_path(socket) {
                self.problem(&export.socket, format!("exports.socket: {reason}"));
            }
            if !sockets.insert(socket.clone()) {
                let text = format!("exports.socket: '{}' is used twice", socket.display());
                self.problem(&export.socket, text);
            }
            if export.volume.get_ref().is_empty() {
                let text = "exports.volume: give the volume's name or id".to_owned();
                self.problem(&export.volume, text);
            }
            let queues = export.queues.as_ref().map_or(QUEUES_DEFAULT, |queues| *queues.get_ref());
            if let Some(at) = &export.queues
                && !(1..=QUEUES_MAX).contains(&queues)
            {
                self.problem(at, format!("exports.queues: it must be 1 to {QUEUES_MAX}"));
            }
            exports.push(ExportConfig {
                volume: export.volume.into_inner(),
                socket: export.socket.into_inner(),
                queues,
                read_only: export.read_only,
                standby: export.standby,
            });
        }
        exports
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"name = "a"
store = "sqlite:/var/lib/holdfast/cluster.db"
listen = "127.0.0.1:4420"
api = "/run/holdfast/a.sock"
[pool]
fast = ["/dev/nvme0n1"]
mass = ["/dev/sda"]
[labels]
rack = "7"
[log]
level = "debug"
format = "json"
[limits]
buffers = "256M"
[[exports]]
volume = "disk1"
socket = "/run/holdfast/disk1.sock"
queues = 2
[heal]
delay_ms = 2500
"#;

    fn errors(text: &str) -> String {
        Config::parse(Path::new("h.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn a_good_one() {
        let config = Config::parse(Path::new("h.toml"), GOOD).unwrap();
        assert_eq!((config.name.as_str(), config.buffer_bytes), ("a", 256 << 20));
        assert_eq!((config.exports[0].queues, config.exports[0].read_only), (2, false));
        assert_eq!(config.heal, HealSettings { delay_ms: 2500, ..HealSettings::default() });
        assert_eq!((config.log_level, config.log_format), (LogLevel::Debug, LogFormat::Json));
        assert_eq!(config.scrub_bytes_per_second, SCRUB_DEFAULT);
        for (scrub, rate) in [("8M", 8 << 20), ("off", 0)] {
            let text = GOOD.replace("[[exports]]", &format!("scrub = \"{scrub}\"\n[[exports]]"));
            let config = Config::parse(Path::new("h.toml"), &text).unwrap();
            assert_eq!(config.scrub_bytes_per_second, rate);
        }
    }

    #[test]
    fn the_example_is_good() {
        let text = include_str!("../holdfastd.example.toml");
        let config = Config::parse(Path::new("holdfastd.example.toml"), text).unwrap();
        assert_eq!(config.name, "a");
    }

    #[test]
    fn unknown_keys_are_named_with_their_line() {
        for (extra, line) in [("\n[limits2]\nx = 1\n", 22), ("queue = 3\n", 21)] {
            let text = errors(&format!("{GOOD}{extra}"));
            assert!(text.starts_with(&format!("h.toml:{line}: unknown field")), "{text}");
        }
    }

    #[test]
    fn every_other_problem_is_told_at_once() {
        let text = errors(
            &GOOD
                .replace("\"a\"", "\"a b\"")
                .replace("sqlite:", "mysql:")
                .replace("127.0.0.1:4420", "localhost:4420")
                .replace("/dev/sda", "sda")
                .replace("256M", "1M\"\nscrub = \"2G")
                .replace("queues = 2", "queues = 0")
                .replace("2500", "5\nfills_max = 0"),
        );
        for part in [
            "h.toml:1: name:",
            "h.toml:2: store:",
            "h.toml:3: listen: 'localhost:4420'",
            "h.toml:7: pool: 'sda' is not an absolute path",
            "h.toml:14: limits.buffers:",
            "h.toml:15: limits.scrub:",
            "h.toml:19: exports.queues:",
            "h.toml:21: heal.delay_ms: it must be 100",
            "h.toml:22: heal.fills_max:",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn an_address_for_all_needs_one_to_advertise() {
        let all = GOOD.replace("127.0.0.1:4420", "0.0.0.0:4420");
        assert!(errors(&all).contains("advertise"));
        let told = all.replace("api =", "advertise = \"192.0.2.7:4420\"\napi =");
        assert!(Config::parse(Path::new("h.toml"), &told).is_ok());
        let bad = all.replace("api =", "advertise = \"0.0.0.0:4420\"\napi =");
        assert!(errors(&bad).contains("nobody can connect"));
    }
}
