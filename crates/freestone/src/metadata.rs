//! What `--mmds` says: the metadata service, and the cards that lead to it.

use std::net::Ipv4Addr;
use std::str::FromStr;

use freestone_vmm::net::mmds::{MmdsConfig, MmdsStore, MmdsVersion};

use crate::options::Options;

/// A metadata service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MmdsSpec {
    /// The cards that lead there, by name.
    pub(crate) cards: Vec<String>,
    /// Its address.
    pub(crate) ipv4: Option<Ipv4Addr>,
    /// Whether a token is needed.
    pub(crate) version: MmdsVersion,
    /// Whether answers are text whatever the guest accepts.
    pub(crate) imds_compat: bool,
}

impl MmdsSpec {
    /// The service's configuration.
    pub(crate) fn config(&self) -> MmdsConfig {
        let config = MmdsConfig::new().version(self.version).imds_compat(self.imds_compat);
        self.ipv4.into_iter().fold(config, MmdsConfig::ipv4)
    }
}

impl FromStr for MmdsSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut options = Options::parse(text, Some("cards"))?;
        let version = |text: &str| match text {
            "v1" => Ok(MmdsVersion::V1),
            "v2" => Ok(MmdsVersion::V2),
            _ => Err("there are v1 and v2".to_owned()),
        };
        let cards = options.text("cards")?.ok_or("say which cards lead to it: cards=net0+net1")?;
        let spec = Self {
            cards: cards.split('+').map(str::to_owned).collect(),
            ipv4: options.with("ipv4", |text| text.parse().map_err(|_| "that is no address".to_owned()))?,
            version: options.with("version", version)?.unwrap_or_default(),
            imds_compat: options.switch("imds-compat")?.unwrap_or(false),
        };
        spec.config().check().map_err(|error| error.to_string())?;
        options.finish("cards, ipv4, version, imds-compat")?;
        Ok(spec)
    }
}

/// The service, and what it says.
#[derive(Debug)]
pub(crate) struct Metadata {
    pub(crate) spec: MmdsSpec,
    pub(crate) store: MmdsStore,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_has_cards_and_an_address() {
        let spec: MmdsSpec = "cards=eth0+eth1,ipv4=169.254.1.2,version=v2,imds-compat".parse().unwrap();
        assert_eq!(spec.cards, ["eth0", "eth1"]);
        assert_eq!(spec.config().ipv4, Ipv4Addr::new(169, 254, 1, 2));
        assert!(spec.version == MmdsVersion::V2 && spec.imds_compat);
        for (text, part) in
            [("v=1", "which cards"), ("a,ipv4=10.0.0.1", "10.0.0.1"), ("a,version=v3", "v1 and v2")]
        {
            let error = text.parse::<MmdsSpec>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
