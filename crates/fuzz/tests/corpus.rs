//! Every target on its kept inputs, and on random changes of them for a while. `FUZZ_SECONDS` is for
//! how long each (default 3), `FUZZ_SEED` where the changes begin.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound.max(1) as u64).unwrap_or(0)
    }
}

fn corpus(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<_> = files
        .map(|file| (file.path(), fs::read(file.path()).expect("a kept input can be read")))
        .collect();
    found.sort();
    found
}

/// An input like `from`, or a new one.
fn changed(from: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = from.to_vec();
    if bytes.is_empty() || random.below(8) == 0 {
        let length = random.below(600);
        bytes = (0..length).map(|_| u8::try_from(random.below(256)).unwrap_or(0)).collect();
    }
    for _ in 0..=random.below(6) {
        if bytes.is_empty() {
            break;
        }
        let at = random.below(bytes.len());
        match random.below(4) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = u8::try_from(random.below(256)).unwrap_or(0),
            2 => drop(bytes.remove(at)),
            _ => bytes.insert(at, u8::try_from(random.below(256)).unwrap_or(0)),
        }
    }
    bytes
}

fn run(name: &str) {
    let (_, target) = fuzz::TARGETS.iter().find(|(known, _)| *known == name).expect("a target");
    let kept = corpus(name);
    assert!(!kept.is_empty(), "{name} has kept inputs");
    for (path, input) in &kept {
        println!("{}", path.display());
        target(input);
    }
    let variable = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let seconds = variable("FUZZ_SECONDS").unwrap_or(3);
    let seed = variable("FUZZ_SEED").unwrap_or_else(|| {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        since.map_or(0, |since| since.as_secs())
    });
    println!("FUZZ_SEED={seed} cargo test --manifest-path crates/fuzz/Cargo.toml {name}");
    let mut random = Random(seed);
    let (started, mut runs) = (Instant::now(), 0_u64);
    while started.elapsed() < Duration::from_secs(seconds) {
        let input = changed(&kept[random.below(kept.len())].1, &mut random);
        let done = std::panic::catch_unwind(|| target(&input));
        if let Err(panic) = done {
            let file = std::env::temp_dir().join(format!("{name}-{seed}-{runs}"));
            fs::write(&file, &input).expect("the input can be kept");
            eprintln!("failed on {}: keep it in crates/fuzz/corpus/{name}/", file.display());
            std::panic::resume_unwind(panic);
        }
        runs += 1;
    }
    println!("{name}: {runs} runs");
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test] fn $name() { run(stringify!($name)); })*

        #[test]
        fn every_target_is_tested() {
            assert_eq!(fuzz::TARGETS.map(|(name, _)| name), [$(stringify!($name)),*]);
        }
    };
}

targets! { nvme_target nvme_session chains messages recovery texts structures }
