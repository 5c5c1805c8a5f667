//! Templates as Firecracker writes them in JSON.

use serde::{Deserialize, Deserializer, de};

use super::{CapabilityModifier, CpuTemplate, CpuidModifier, MsrModifier};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    #[serde(default)]
    kvm_capabilities: Vec<String>,
    #[serde(default)]
    cpuid_modifiers: Vec<RawLeaf>,
    #[serde(default)]
    msr_modifiers: Vec<RawMsr>,
    /// These two are for other processors.
    #[serde(default)]
    reg_modifiers: Vec<de::IgnoredAny>,
    #[serde(default)]
    vcpu_features: Vec<de::IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLeaf {
    leaf: String,
    subleaf: String,
    flags: u32,
    modifiers: Vec<RawRegister>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRegister {
    register: String,
    bitmap: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMsr {
    addr: String,
    bitmap: String,
}

impl Raw {
    fn template(&self) -> crate::Result<CpuTemplate> {
        let leaf = |raw: &RawLeaf| {
            let registers = raw.modifiers.iter().map(|m| (m.register.as_str(), m.bitmap.as_str()));
            CpuidModifier::parse(&raw.leaf, &raw.subleaf, raw.flags, &registers.collect::<Vec<_>>())
        };
        let template = CpuTemplate {
            cpuid: self.cpuid_modifiers.iter().map(leaf).collect::<Result<_, _>>()?,
            msrs: self
                .msr_modifiers
                .iter()
                .map(|m| MsrModifier::parse(&m.addr, &m.bitmap))
                .collect::<Result<_, _>>()?,
            capabilities: self
                .kvm_capabilities
                .iter()
                .map(|c| CapabilityModifier::parse(c))
                .collect::<Result<_, _>>()?,
        };
        template.check()?;
        Ok(template)
    }
}

impl<'de> Deserialize<'de> for CpuTemplate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Raw::deserialize(deserializer)?;
        if !raw.reg_modifiers.is_empty() || !raw.vcpu_features.is_empty() {
            return Err(de::Error::custom("reg_modifiers and vcpu_features are for aarch64"));
        }
        raw.template().map_err(de::Error::custom)
    }
}
