//! What the guest boots.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Kernel, initial RAM disk and command line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BootSource {
    /// The kernel's file.
    pub(crate) kernel_image_path: PathBuf,
    /// The initial RAM disk's file.
    #[serde(default)]
    pub(crate) initrd_path: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default)]
    pub(crate) boot_args: Option<String>,
}
