#![no_main]

#[path = "../src/checks.rs"]
#[allow(dead_code, reason = "one target, one check")]
mod checks;

libfuzzer_sys::fuzz_target!(|data: &[u8]| checks::report(data));
