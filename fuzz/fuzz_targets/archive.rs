#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| roost_agent::fuzz::archive(bytes));
