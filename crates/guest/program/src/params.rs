//! The parameter block: the first bytes of the image at 1 MiB, which the host may write before or while the program runs.

/// Guest-physical address of the block.
pub const ADDRESS: u64 = 0x10_0000;

/// Reserves the block in the image, with initial values.
#[macro_export]
macro_rules! params {
    ($($word:expr),* $(,)?) => {
        #[used]
        #[unsafe(link_section = ".params")]
        static PARAMS: [u64; 16] = {
            let mut words = [0; 16];
            let given = [$($word),*];
            let mut i = 0;
            while i < given.len() {
                words[i] = given[i];
                i += 1;
            }
            words
        };
    };
}

/// Reads word `index` of the block.
pub fn get(index: u64) -> u64 {
    // SAFETY: the linker script reserves 16 words here, and nothing else of the program refers to them.
    unsafe { word(index).read_volatile() }
}

/// Writes word `index` of the block.
pub fn set(index: u64, value: u64) {
    // SAFETY: as in `get`.
    unsafe { word(index).write_volatile(value) }
}

fn word(index: u64) -> *mut u64 {
    core::ptr::with_exposed_provenance_mut((ADDRESS + 8 * (index % 16)) as usize)
}
