//! Changes to what the CPUs are: bits of CPUID and MSRs. They are checked and kept in the form they came in.

use serde::{Deserialize, Serialize};

use crate::api::fault::Fault;

/// Changes to the CPU.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct CpuConfig {
    /// KVM capabilities to require, or with `!` not to.
    pub(crate) kvm_capabilities: Vec<String>,
    /// Bits of CPUID.
    pub(crate) cpuid_modifiers: Vec<CpuidLeaf>,
    /// Bits of MSRs.
    pub(crate) msr_modifiers: Vec<Msr>,
}

/// Bits of a leaf of CPUID.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CpuidLeaf {
    /// EAX before CPUID.
    pub(crate) leaf: String,
    /// ECX before CPUID.
    pub(crate) subleaf: String,
    /// `KVM_CPUID_FLAG_*`.
    pub(crate) flags: u32,
    /// Bits.
    pub(crate) modifiers: Vec<CpuidRegister>,
}

/// Bits of a register after CPUID.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CpuidRegister {
    /// Which.
    pub(crate) register: Register,
    /// 32 of `0`, `1` and `x`, after `0b`.
    pub(crate) bitmap: String,
}

/// A register of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Bits of a model specific register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Msr {
    /// Its number.
    pub(crate) addr: String,
    /// 64 of `0`, `1` and `x`, after `0b`.
    pub(crate) bitmap: String,
}

/// Bits to force: `value & !mask | bits`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bits {
    /// Which are forced.
    pub(crate) mask: u64,
    /// To what.
    pub(crate) bits: u64,
}

impl CpuConfig {
    /// Whether every number and every bitmap is one.
    pub(crate) fn check(&self) -> Result<(), Fault> {
        for capability in &self.kvm_capabilities {
            number("kvm_capabilities", capability.strip_prefix('!').unwrap_or(capability))?;
        }
        for leaf in &self.cpuid_modifiers {
            number("leaf", &leaf.leaf)?;
            number("subleaf", &leaf.subleaf)?;
            for register in &leaf.modifiers {
                bitmap(&register.bitmap, 32)?;
            }
        }
        for msr in &self.msr_modifiers {
            number("addr", &msr.addr)?;
            bitmap(&msr.bitmap, 64)?;
        }
        Ok(())
    }

    /// Whether nothing is changed.
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A number of 32 bits: `0x1f`, `0b1` or decimal.
pub(crate) fn number(field: &str, text: &str) -> Result<u32, Fault> {
    let (digits, radix) = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
        (Some(digits), _) => (digits, 16),
        (_, Some(digits)) => (digits, 2),
        _ => (text, 10),
    };
    let digits = Some(digits).filter(|digits| !digits.starts_with('+'));
    digits.and_then(|digits| u32::from_str_radix(digits, radix).ok()).ok_or_else(|| {
        Fault::bad_request(format!("{field}: {text:?} is not a number of 32 bits (0x..., 0b... or decimal)"))
    })
}

/// Bits from the highest down: up to `width` of `0`, `1` and `x`; underscores are for the eye.
pub(crate) fn bitmap(text: &str, width: usize) -> Result<Bits, Fault> {
    let wrong = || {
        Fault::bad_request(format!("bitmap: {text:?} is not 0b and up to {width} characters of 0, 1 and x"))
    };
    let digits = text.strip_prefix("0b").ok_or_else(wrong)?;
    let mut bits = Bits { mask: 0, bits: 0 };
    let mut count = 0;
    for digit in digits.chars().filter(|&c| c != '_') {
        let (mask, bit) = match digit {
            '0' => (1, 0),
            '1' => (1, 1),
            'x' => (0, 0),
            _ => return Err(wrong()),
        };
        bits = Bits { mask: bits.mask << 1 | mask, bits: bits.bits << 1 | bit };
        count += 1;
    }
    if count == 0 || count > width { Err(wrong()) } else { Ok(bits) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_hexadecimal_binary_or_decimal() {
        assert_eq!(number("leaf", "0x8000_0000".replace('_', "").as_str()).unwrap(), 0x8000_0000);
        assert_eq!(number("leaf", "0b101").unwrap(), 5);
        assert_eq!(number("leaf", "266").unwrap(), 266);
        for wrong in ["", "0x", "0x1_0000_0000", "+1", "-1", "seven", "0x+1"] {
            assert!(number("leaf", wrong).unwrap_err().message.contains("leaf"), "{wrong}");
        }
    }

    #[test]
    fn a_bitmap_says_which_bits_are_forced_and_to_what() {
        assert_eq!(bitmap("0bx1_0x", 32).unwrap(), Bits { mask: 0b0110, bits: 0b0100 });
        assert_eq!(bitmap(&format!("0b{}", "1".repeat(64)), 64).unwrap().bits, u64::MAX);
        assert!(bitmap(&format!("0b{}", "1".repeat(33)), 32).is_err());
        assert!(bitmap("0b", 32).is_err());
        assert!(bitmap("01", 32).is_err());
        assert!(bitmap("0b2", 32).is_err());
    }
}
