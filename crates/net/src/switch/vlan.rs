//! VLANs of a port: which one a frame is in when it comes in, and whether and how it goes out.
//!
//! The words are those of IEEE 802.1Q: VID, PCP, DEI; 0x8100 marks a C-tag and 0x88A8 an S-tag. Both are taken for the tag of a
//! frame, and the type is kept from trunk to trunk.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// Highest VID; 4095 is reserved and 0 means none.
const LAST_VID: u16 = 4094;
const DEI: u16 = 1 << 12;
const PCP: u16 = 0b111 << 13;
const VID: u16 = 0xFFF;

/// Whether this type of Ethernet frame says that a VLAN tag follows.
pub(super) fn is_tag(ethertype: u16) -> bool {
    matches!(ethertype, 0x8100 | 0x88A8)
}

/// A set of VLANs, as `10,20-29`.
#[derive(Clone, PartialEq, Eq)]
pub struct VlanSet(Box<[u64; 64]>);

impl VlanSet {
    /// No VLAN.
    pub fn none() -> Self {
        Self(Box::new([0; 64]))
    }

    /// All VLANs: 1 to 4094.
    pub fn all() -> Self {
        (1..=LAST_VID).collect()
    }

    /// Adds a VLAN; what is none, from 1 to 4094, is ignored.
    pub fn insert(&mut self, vlan: u16) {
        if let Some(word) = self.0.get_mut(usize::from(vlan >> 6))
            && (1..=LAST_VID).contains(&vlan)
        {
            *word |= 1 << (vlan & 63);
        }
    }

    /// Whether a VLAN is in the set.
    pub fn contains(&self, vlan: u16) -> bool {
        self.0.get(usize::from(vlan >> 6)).is_some_and(|word| word >> (vlan & 63) & 1 != 0)
    }

    /// All VLANs in the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u16> {
        (1..=LAST_VID).filter(|&vlan| self.contains(vlan))
    }
}

impl FromIterator<u16> for VlanSet {
    fn from_iter<I: IntoIterator<Item = u16>>(vlans: I) -> Self {
        let mut set = Self::none();
        vlans.into_iter().for_each(|vlan| set.insert(vlan));
        set
    }
}

impl fmt::Display for VlanSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut vlans = self.iter().peekable();
        let mut comma = "";
        while let Some(first) = vlans.next() {
            let mut last = first;
            while let Some(next) = vlans.next_if_eq(&last.saturating_add(1)) {
                last = next;
            }
            write!(f, "{comma}{first}")?;
            if last > first {
                write!(f, "-{last}")?;
            }
            comma = ",";
        }
        Ok(())
    }
}

impl fmt::Debug for VlanSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VlanSet({self})")
    }
}

impl FromStr for VlanSet {
    type Err = Error;

    /// Numbers and ranges from 1 to 4094 with commas between.
    fn from_str(text: &str) -> Result<Self> {
        let wrong =
            || Error::invalid("list of VLANs", text, "say numbers from 1 to 4094 and ranges, as 10,20-29");
        let mut set = Self::none();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let vid =
                |text: &str| text.parse().ok().filter(|vid| (1..=LAST_VID).contains(vid)).ok_or_else(wrong);
            let (first, last) = (vid(first)?, vid(last)?);
            if first > last {
                return Err(wrong());
            }
            (first..=last).for_each(|vlan| set.insert(vlan));
        }
        Ok(set)
    }
}

/// How a port takes part in VLANs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Vlan {
    /// The machine is in this VLAN, from 1 to 4094, and does not see it: its frames have no tags. A frame with a tag is refused,
    /// but for a priority tag (VID 0), which is taken off.
    Access(u16),
    /// The machine sees the VLANs `allowed` by tags. Frames without a tag are in `native`; without one they are refused.
    Trunk {
        /// VLANs that may pass.
        allowed: VlanSet,
        /// The VLAN of frames without tags; passes even if it is not in `allowed`.
        native: Option<u16>,
    },
}

impl Default for Vlan {
    /// Access to VLAN 1.
    fn default() -> Self {
        Self::Access(1)
    }
}

impl Vlan {
    /// A trunk of all VLANs, with VLAN 1 native.
    pub fn trunk() -> Self {
        Self::Trunk { allowed: VlanSet::all(), native: Some(1) }
    }

    pub(super) fn check(&self) -> Result<()> {
        match self {
            Self::Access(vlan) | Self::Trunk { native: Some(vlan), .. } if !(1..=LAST_VID).contains(vlan) => {
                Err(Error::invalid("VLAN", vlan.to_string(), "it is from 1 to 4094"))
            }
            _ => Ok(()),
        }
    }

    /// The VLAN of a frame with this tag that comes in; `None` if it may not.
    pub(super) fn classify(&self, tag: Option<Tag>) -> Option<u16> {
        let vid = tag.map_or(0, |tag| tag.tci & VID);
        match self {
            Self::Access(vlan) => (vid == 0).then_some(*vlan),
            Self::Trunk { native, .. } if vid == 0 => *native,
            Self::Trunk { allowed, native } => (allowed.contains(vid) || *native == Some(vid)).then_some(vid),
        }
    }

    /// How a frame of `vlan` goes out; `None` if it may not.
    pub(super) fn egress(&self, vlan: u16) -> Option<Egress> {
        match self {
            Self::Access(own) => (*own == vlan).then_some(Egress::Untagged),
            Self::Trunk { native, .. } if *native == Some(vlan) => Some(Egress::Untagged),
            Self::Trunk { allowed, .. } => allowed.contains(vlan).then_some(Egress::Tagged),
        }
    }
}

/// Whether a frame goes out with a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Egress {
    Untagged,
    Tagged,
}

/// A VLAN tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tag {
    /// 0x8100 or 0x88A8.
    pub(super) tpid: u16,
    /// PCP, DEI, VID.
    pub(super) tci: u16,
}

impl Tag {
    /// The tag of a frame of `vlan`. The priority is kept; DEI is ours: between the switches of several processes it marks what
    /// came from an isolated port.
    pub(super) fn on(came: Option<Self>, vlan: u16, isolated: bool) -> Self {
        let came = came.unwrap_or(Self { tpid: 0x8100, tci: 0 });
        Self { tpid: came.tpid, tci: came.tci & PCP | vlan | if isolated { DEI } else { 0 } }
    }

    pub(super) fn to_bytes(self) -> [u8; 4] {
        let ([a, b], [c, d]) = (self.tpid.to_be_bytes(), self.tci.to_be_bytes());
        [a, b, c, d]
    }

    pub(super) fn dei(self) -> bool {
        self.tci & DEI != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_of_vlans_is_shown_as_it_is_read() {
        for text in ["1", "1-4094", "10,20-29,4094", "63-65"] {
            assert_eq!(text.parse::<VlanSet>().unwrap().to_string(), text);
        }
        assert_eq!(VlanSet::all().iter().count(), 4094);
        assert_eq!(VlanSet::none().to_string(), "");
    }

    #[test]
    fn what_is_no_set_of_vlans_is_refused_by_name() {
        for text in ["", "0", "4095", "5-4", "1,", "a", "1-2-3", "-3"] {
            let error = text.parse::<VlanSet>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }

    #[test]
    fn a_vlan_that_there_is_not_is_refused() {
        assert!(Vlan::Access(0).check().is_err());
        assert!(Vlan::Access(4095).check().is_err());
        assert!(Vlan::Trunk { allowed: VlanSet::none(), native: Some(0) }.check().is_err());
        assert!(Vlan::trunk().check().is_ok());
    }
}
