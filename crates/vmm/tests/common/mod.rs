//! What the tests on /dev/kvm share.

use std::io::Write;
use std::sync::{Arc, Mutex};

use freestone_vmm::kvm::Kvm;

/// /dev/kvm, or nothing after saying that `test` was skipped.
pub fn kvm(test: &str) -> Option<Kvm> {
    Kvm::open().inspect_err(|reason| freestone_testkit::skip(test, &reason.to_string())).ok()
}

/// What the guest printed.
#[derive(Clone, Default)]
pub struct Console(pub Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
