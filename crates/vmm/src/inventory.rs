//! The devices of a machine: owned as [`Device`], never named by type.

use freestone_bus::Device;
use freestone_snapshot::{Sections, State};

use crate::{Error, Result};

/// Devices in the order in which they were plugged in: that is start order; the reverse is stop order.
#[derive(Debug, Default)]
pub struct Inventory {
    devices: Vec<Box<dyn Device>>,
}

impl Inventory {
    /// Adds a device.
    ///
    /// # Errors
    /// [`Error::DuplicateDevice`] if its name is taken.
    pub fn add(&mut self, device: Box<dyn Device>) -> Result<()> {
        if self.names().any(|n| n == device.name()) {
            return Err(Error::DuplicateDevice(device.name().to_owned()));
        }
        self.devices.push(device);
        Ok(())
    }

    /// Names of the devices, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.devices.iter().map(|d| d.name())
    }

    /// Pauses all devices, last first. If one refuses, those paused before it are resumed.
    ///
    /// # Errors
    /// [`Error::Device`] of the first that refuses.
    pub fn pause(&mut self) -> Result<()> {
        for at in (0..self.devices.len()).rev() {
            let Some(device) = self.devices.get_mut(at) else { continue };
            if let Err(source) = device.pause() {
                let error = Error::Device { doing: "pause", device: device.name().to_owned(), source };
                for paused in self.devices.iter_mut().skip(at + 1) {
                    if let Err(source) = paused.resume() {
                        tracing::error!(device = paused.name(), %source, "cannot resume after a refused pause");
                    }
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Resumes all devices, first first.
    ///
    /// # Errors
    /// [`Error::Device`] of the first that fails; those before it are paused again.
    pub fn resume(&mut self) -> Result<()> {
        for index in 0..self.devices.len() {
            let Some((device, resumed)) = self.devices.get_mut(..=index).and_then(<[_]>::split_last_mut)
            else {
                continue;
            };
            if let Err(source) = device.resume() {
                for earlier in resumed.iter_mut().rev() {
                    if let Err(error) = earlier.pause() {
                        tracing::error!(device = earlier.name(), %error, "cannot pause the device again");
                    }
                }
                return Err(Error::Device { doing: "resume", device: device.name().to_owned(), source });
            }
        }
        Ok(())
    }

    /// Adds the state of every device to `state`. They must be paused.
    ///
    /// # Errors
    /// [`Error::Device`] of the first that cannot be saved.
    pub fn save(&mut self, state: &mut State) -> Result<()> {
        self.devices.iter_mut().try_for_each(|device| {
            let name = device.name().to_owned();
            let saved = device.save(&mut state.of(&name));
            saved.map_err(|source| Error::Device { doing: "save", device: name, source })
        })
    }

    /// Makes every device what it was when `sections` were saved, in the order in which they were plugged in.
    ///
    /// # Errors
    /// [`Error::Device`] of the first that cannot be restored.
    pub fn restore(&mut self, sections: &mut Sections) -> Result<()> {
        self.devices.iter_mut().try_for_each(|device| {
            let name = device.name().to_owned();
            let restored = device.restore(&mut sections.of(&name));
            restored.map_err(|source| Error::Device { doing: "restore", device: name, source })
        })
    }

    /// Shuts all devices down, last first; goes on past failures so that every disk is flushed.
    ///
    /// # Errors
    /// [`Error::Device`] of the first that failed.
    pub fn shutdown(&mut self) -> Result<()> {
        let mut result = Ok(());
        for device in self.devices.iter_mut().rev() {
            if let Err(source) = device.shutdown() {
                tracing::error!(device = device.name(), %source, "cannot shut the device down");
                let device = device.name().to_owned();
                result = result.and(Err(Error::Device { doing: "shut down", device, source }));
            }
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    struct Probe {
        name: &'static str,
        log: Arc<Mutex<Vec<String>>>,
        refuses: bool,
    }

    impl Probe {
        fn note(&self, what: &str) -> freestone_bus::Result<()> {
            self.log.lock().unwrap().push(format!("{what} {}", self.name));
            if self.refuses {
                return Err(freestone_bus::Error::Missing { what: "will", device: self.name.into() });
            }
            Ok(())
        }
    }

    impl Device for Probe {
        fn name(&self) -> &str {
            self.name
        }
        fn pause(&mut self) -> freestone_bus::Result<()> {
            self.note("pause")
        }
        fn resume(&mut self) -> freestone_bus::Result<()> {
            self.note("resume")
        }
        fn shutdown(&mut self) -> freestone_bus::Result<()> {
            self.note("shutdown")
        }
    }

    fn three(refuses: &str) -> (Inventory, Arc<Mutex<Vec<String>>>) {
        let log = Arc::new(Mutex::new(Vec::new()));
        let mut inventory = Inventory::default();
        for name in ["a", "b", "c"] {
            let probe = Probe { name, log: log.clone(), refuses: name == refuses };
            inventory.add(Box::new(probe)).unwrap();
        }
        (inventory, log)
    }

    #[test]
    fn devices_pause_in_reverse_and_resume_in_order() {
        let (mut inventory, log) = three("");
        inventory.pause().unwrap();
        inventory.resume().unwrap();
        let log = log.lock().unwrap();
        assert_eq!(*log, ["pause c", "pause b", "pause a", "resume a", "resume b", "resume c"]);
    }

    #[test]
    fn a_refused_pause_resumes_what_was_paused() {
        let (mut inventory, log) = three("b");
        let error = inventory.pause().unwrap_err();
        assert_eq!(error.to_string(), "cannot pause device b");
        assert_eq!(*log.lock().unwrap(), ["pause c", "pause b", "resume c"]);
    }

    #[test]
    fn shutdown_goes_on_past_a_failure_and_reports_it() {
        let (mut inventory, log) = three("c");
        assert!(matches!(inventory.shutdown(), Err(Error::Device { device, .. }) if device == "c"));
        assert_eq!(*log.lock().unwrap(), ["shutdown c", "shutdown b", "shutdown a"]);
    }

    #[test]
    fn two_devices_may_not_have_one_name() {
        let (mut inventory, log) = three("");
        let twin = Box::new(Probe { name: "b", log, refuses: false });
        assert!(matches!(inventory.add(twin), Err(Error::DuplicateDevice(n)) if n == "b"));
    }
}
