use freestone_hypervisor::{Hypervisor, Vm};
use freestone_testkit::{Script, ScriptedHypervisor};

use super::*;
use crate::cpuid::{CpuidConfig, filter};

fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidLeaf {
    CpuidLeaf { function, index, indexed: index > 0, eax, ebx, ecx, edx }
}

fn cpuid(leaf: &str, registers: &[(&str, &str)]) -> CpuTemplate {
    let modifier = CpuidModifier::parse(leaf, "0", 0, registers).unwrap();
    CpuTemplate { cpuid: vec![modifier], ..CpuTemplate::new() }
}

#[test]
fn bits_are_cleared_set_and_kept() {
    let bits = Bits::<u32>::parse("0b01x").unwrap();
    assert_eq!(bits, Bits { mask: 0b110, value: 0b010 });
    assert_eq!((bits.apply(0b1111), bits.apply(0)), (0b1011, 0b010));
    let all = format!("0b{}", "1".repeat(64));
    assert_eq!(Bits::<u64>::parse(&all).unwrap().apply(0), u64::MAX);
    assert_eq!(Bits::<u64>::parse("0b1111_xx00").unwrap().apply(0b11), 0b1111_0000);
    assert_eq!(format!("{:?}", Bits::<u32>::parse("0b1_0x").unwrap()), format!("0b{}10x", "x".repeat(29)));
}

#[test]
fn what_is_no_bitmap_or_number_is_refused_by_name() {
    for bad in ["", "0b", "0b_", "01x", "0b2", "0bX", "0b 1", &format!("0b{}", "x".repeat(33))] {
        let error = Bits::<u32>::parse(bad).unwrap_err().to_string();
        assert!(error.contains(&format!("{bad:?}")), "{error}");
    }
    for (text, value) in [("0x1F", 31), ("0b101", 5), ("42", 42), ("0xffffffff", u32::MAX)] {
        assert_eq!(number("x", text).unwrap(), value);
    }
    for bad in ["", "0x", "0b", "-1", "+1", "0x+1", "0x100000000", "ten", "1 "] {
        number("x", bad).unwrap_err();
    }
    assert!(CpuidModifier::parse("0", "0", 0, &[("rax", "0b1")]).is_err());
    assert!(CpuidModifier::parse("0", "0", 0, &[("eax", "0b1"), ("eax", "0b0")]).is_err());
    assert!(CpuidModifier::parse("0", "0", 8, &[]).is_err());
}

#[test]
fn capabilities_are_required_or_not() {
    let parse = |text| CapabilityModifier::parse(text).unwrap();
    let template = CpuTemplate { capabilities: vec![parse("121"), parse("!56")], ..CpuTemplate::new() };
    assert_eq!(template.required_capabilities().collect::<Vec<_>>(), [121]);
    assert!(!template.is_empty());
    CapabilityModifier::parse("!").unwrap_err();
}

#[test]
fn a_leaf_is_changed_in_place() {
    let host = [leaf(0x7, 0, [0, 0b1111, 5, 6])];
    let mut leaves = host.to_vec();
    cpuid("0x7", &[("ebx", "0b0x"), ("edx", "0b1xxx")]).apply_cpuid(&mut leaves, &host).unwrap();
    assert_eq!(leaves, [leaf(0x7, 0, [0, 0b1101, 5, 0b1110])]);
}

#[test]
fn a_leaf_that_is_hidden_is_added_and_one_that_the_host_lacks_is_an_error() {
    let host = [leaf(0x1, 0, [0; 4]), leaf(0x5, 0, [7; 4]), leaf(0x7, 0, [0; 4])];
    let mut leaves = vec![host[0], host[2]];
    cpuid("5", &[("eax", "0b1x")]).apply_cpuid(&mut leaves, &host).unwrap();
    assert_eq!(leaves[1], leaf(0x5, 0, [2, 0, 0, 0]));
    assert!(leaves.is_sorted_by_key(|leaf| leaf.function));
    let absent = cpuid("0x14", &[("eax", "0b1")]);
    assert!(absent.apply_cpuid(&mut leaves, &host).unwrap_err().to_string().contains("0x14.0x0"));
    let clears = cpuid("0x14", &[("eax", "0b00000000")]);
    clears.apply_cpuid(&mut leaves, &host).unwrap();
    assert_eq!(leaves.len(), 3, "what is not there is zero already");
}

#[test]
fn which_vcpu_it_is_stays_as_it_was() {
    let host = [
        leaf(0x0, 0, [0x1f, 0, 0, 0]),
        leaf(0x1, 0, [0x000c_06f2, 0x0010_0800, u32::MAX, u32::MAX]),
        leaf(0x4, 0, [0x1c00_4121, 0, 0, 0]),
        leaf(0xb, 0, [1, 2, 3, 4]),
        leaf(0x8000_0008, 0, [0x3030, 0, 0x7007, 0]),
    ];
    let mut leaves = filter(&host, &CpuidConfig::new(4, 2));
    let before = leaves.clone();
    let zeros = format!("0b{}", "0".repeat(32));
    let registers = ["eax", "ebx", "ecx", "edx"].map(|register| (register, zeros.as_str()));
    for function in ["0x1", "0x4", "0xb", "0x80000008"] {
        cpuid(function, &registers).apply_cpuid(&mut leaves, &host).unwrap();
    }
    let find = |leaves: &[CpuidLeaf], function| *leaves.iter().find(|l| l.function == function).unwrap();
    let (was, is) = (find(&before, 0x1), find(&leaves, 0x1));
    assert_eq!((is.eax, is.ebx, is.ecx), (0, was.ebx & 0xffff_0000, 1 << 31));
    assert_eq!(is.ebx >> 24, 2, "the APIC ID");
    assert_eq!(find(&leaves, 0xb), find(&before, 0xb));
    assert_eq!(find(&leaves, 0x4).eax, find(&before, 0x4).eax & 0xffff_c000);
}

#[test]
fn what_is_there_twice_is_refused() {
    let mut template = cpuid("1", &[]);
    template.check().unwrap();
    template.cpuid.push(template.cpuid[0].clone());
    assert!(template.check().unwrap_err().to_string().contains("0x1.0x0"));
    let msr = MsrModifier::parse("0x10a", "0b1").unwrap();
    let template = CpuTemplate { msrs: vec![msr, msr], ..CpuTemplate::new() };
    assert!(template.check().unwrap_err().to_string().contains("0x10a"));
}

#[test]
fn registers_are_read_changed_and_written() {
    let vm = ScriptedHypervisor::new(Script::new().halt()).create_vm().unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_msrs(&[Msr { index: 0x1a0, value: 0b1100 }]).unwrap();
    let template =
        CpuTemplate { msrs: vec![MsrModifier::parse("0x1a0", "0b0x01").unwrap()], ..CpuTemplate::new() };
    template.apply_msrs(&mut vcpu).unwrap();
    let mut msr = [Msr { index: 0x1a0, value: 0 }];
    vcpu.msrs(&mut msr).unwrap();
    assert_eq!(msr[0].value, 0b0101);
}

#[test]
fn a_template_is_read_from_json() {
    let text = r#"{
        "kvm_capabilities": ["!56"],
        "cpuid_modifiers": [{"leaf": "0x80000001", "subleaf": "0x0", "flags": 0,
            "modifiers": [{"register": "ecx", "bitmap": "0bxxxx_0xx1"}]}],
        "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b1x"}]
    }"#;
    let template: CpuTemplate = serde_json::from_str(text).unwrap();
    assert_eq!(template.cpuid[0].registers, [(Register::Ecx, Bits { mask: 0b1001, value: 1 })]);
    assert_eq!((template.msrs[0].index, template.capabilities[0].required), (0x10a, false));
    assert!(serde_json::from_str::<CpuTemplate>("{}").unwrap().is_empty());
    for bad in [
        r#"{"unknown": []}"#,
        r#"{"reg_modifiers": [{"addr": "0x0", "bitmap": "0b1"}]}"#,
        r#"{"msr_modifiers": [{"addr": "0x10a", "bitmap": "10"}]}"#,
        r#"{"msr_modifiers": [{"addr": "1", "bitmap": "0b1"}, {"addr": "0x1", "bitmap": "0b1"}]}"#,
    ] {
        serde_json::from_str::<CpuTemplate>(bad).unwrap_err();
    }
}
