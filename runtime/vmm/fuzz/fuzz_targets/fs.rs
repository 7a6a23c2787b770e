#![no_main]

libfuzzer_sys::fuzz_target!(|steps: &[u8]| podvisor_vmm_fuzz::drive("fs", steps));
