#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::nvme_target(data));
