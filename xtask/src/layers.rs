//! Checks the layers of the architecture: which crate may depend on which.
//!
//! A crate uses only crates of lower layers; nothing below the KVM backend knows KVM; no device knows the hypervisor.

#![cfg(test)]

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::repo;

/// The layer of each crate of the workspace, as `docs/architecture.md` has them. Crates without a layer (the guest
/// programs, the benches, these tasks) may use any.
const LAYERS: [(&str, u32); 20] = [
    ("freestone-memory", 0),
    ("freestone-snapshot", 0),
    ("freestone-scheduler", 0),
    ("freestone-sandbox", 0),
    ("freestone-bus", 1),
    ("freestone-block", 1),
    ("freestone-net", 1),
    ("freestone-hypervisor", 2),
    ("freestone-devices", 2),
    ("freestone-virtio", 2),
    ("freestone-loader", 2),
    ("freestone-kvm", 3),
    ("freestone-vcpu", 3),
    ("freestone-testkit", 3),
    ("freestone-vmm", 4),
    ("freestone", 5),
    // Beside the layers: the guest's programs, for tests, benches and the reference VMM; and what uses everything.
    ("freestone-guest", 4),
    ("freestone-benches", 6),
    ("freestone-docs", 6),
    ("xtask", 6),
];

/// Crates whose code is devices or what devices are made of.
const DEVICES: [&str; 5] =
    ["freestone-bus", "freestone-block", "freestone-net", "freestone-devices", "freestone-virtio"];

type Graph = BTreeMap<String, BTreeSet<String>>;

/// The normal dependencies of every package, by names, as cargo resolves them.
fn dependencies() -> Graph {
    let text = repo::output(repo::cargo().args(["metadata", "--format-version", "1", "--locked"]))
        .or_else(|_| repo::output(repo::cargo().args(["metadata", "--format-version", "1"])))
        .unwrap();
    let metadata: Value = serde_json::from_str(&text).unwrap();
    let names: BTreeMap<&str, &str> = array(&metadata["packages"])
        .map(|package| (package["id"].as_str().unwrap(), package["name"].as_str().unwrap()))
        .collect();
    let mut graph = Graph::new();
    for node in array(&metadata["resolve"]["nodes"]) {
        let from = names[node["id"].as_str().unwrap()];
        let normal =
            array(&node["deps"]).filter(|dep| array(&dep["dep_kinds"]).any(|kind| kind["kind"].is_null()));
        let to = normal.map(|dep| names[dep["pkg"].as_str().unwrap()].to_owned());
        graph.entry(from.to_owned()).or_default().extend(to);
    }
    graph
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().unwrap().iter()
}

/// Everything that `package` depends on, directly or not.
fn closure(graph: &Graph, package: &str) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    let mut queue = vec![package.to_owned()];
    while let Some(name) = queue.pop() {
        for dependency in graph.get(&name).into_iter().flatten() {
            if seen.insert(dependency.clone()) {
                queue.push(dependency.clone());
            }
        }
    }
    seen
}

/// The rules that `graph` breaks.
fn violations(graph: &Graph) -> Vec<String> {
    let layers: BTreeMap<&str, u32> = LAYERS.into();
    let mut found = Vec::new();
    for (package, dependencies) in graph {
        let Some(layer) = layers.get(package.as_str()) else { continue };
        for dependency in dependencies {
            if layers.get(dependency.as_str()).is_some_and(|lower| lower >= layer) {
                found.push(format!(
                    "{package} (layer {layer}) depends on {dependency}, which is in no lower layer"
                ));
            }
        }
        let all = closure(graph, package);
        if *layer <= 2 && all.contains("kvm-ioctls") {
            found.push(format!("{package} (layer {layer}) depends on kvm-ioctls"));
        }
        for forbidden in ["freestone-hypervisor", "freestone-kvm"] {
            if DEVICES.contains(&package.as_str()) && all.contains(forbidden) {
                found.push(format!("{package} is a device crate and depends on {forbidden}"));
            }
        }
    }
    found
}

fn graph(edges: &[(&str, &str)]) -> Graph {
    let mut graph = Graph::new();
    for (from, to) in edges {
        graph.entry((*from).to_owned()).or_default().insert((*to).to_owned());
    }
    graph
}

#[test]
fn crates_depend_only_on_crates_of_lower_layers() {
    assert_eq!(violations(&dependencies()), Vec::<String>::new());
}

#[test]
fn every_crate_of_the_workspace_has_a_layer() {
    let metadata = crate::examples::metadata().unwrap();
    let layers: BTreeMap<&str, u32> = LAYERS.into();
    let unknown: Vec<_> = array(&metadata["packages"])
        .map(|package| package["name"].as_str().unwrap())
        .filter(|name| !layers.contains_key(name))
        .collect();
    assert_eq!(unknown, Vec::<&str>::new());
}

#[test]
fn a_dependency_on_an_equal_or_higher_layer_is_found() {
    assert_eq!(violations(&graph(&[("freestone-virtio", "freestone-loader")])).len(), 1);
    assert_eq!(violations(&graph(&[("freestone-memory", "freestone-bus")])).len(), 1);
}

#[test]
fn kvm_is_found_behind_other_crates() {
    let graph = graph(&[("freestone-loader", "innocent"), ("innocent", "kvm-ioctls")]);
    assert_eq!(violations(&graph).len(), 1);
}

#[test]
fn a_device_crate_that_knows_the_hypervisor_is_found() {
    let graph = graph(&[("freestone-devices", "innocent"), ("innocent", "freestone-hypervisor")]);
    assert_eq!(
        violations(&graph),
        ["freestone-devices is a device crate and depends on freestone-hypervisor"]
    );
}
