//! What `freestone image` prints.

use std::fmt::Write;

use freestone_block::tools::{CheckReport, ImageInfo};
use serde_json::{Value, json};

use super::both;

pub(super) fn text(chain: &[ImageInfo]) -> String {
    chain.iter().map(one).collect::<Vec<_>>().join("\n")
}

fn one(info: &ImageInfo) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a string does not fail.
        let _ = writeln!(out, "{name:<15} {value}");
    };
    line("image", info.path.display().to_string());
    line("format", info.format.name().into());
    line("virtual size", both(info.virtual_size));
    line("on disk", both(info.disk_size));
    if let Some(qcow2) = &info.qcow2 {
        line("version", qcow2.version.to_string());
        line("cluster size", both(qcow2.cluster_size));
        line("refcount bits", qcow2.refcount_bits.to_string());
        if let Some(backing) = &qcow2.backing {
            line("backing file", backing.clone());
            let format = qcow2.backing_format.as_deref().unwrap_or("raw (not stated)");
            line("backing format", format.into());
        }
        for (is, what) in [
            (qcow2.lazy_refcounts, "lazy refcounts"),
            (qcow2.dirty, "dirty: refcounts are counted anew at the next start"),
            (qcow2.corrupt, "corrupt: check and repair it"),
            (qcow2.bitmaps, "persistent bitmaps"),
        ] {
            if is {
                line("feature", what.into());
            }
        }
        for snapshot in &qcow2.snapshots {
            line("snapshot", snapshot.clone());
        }
    }
    out
}

pub(super) fn json(chain: &[ImageInfo]) -> Value {
    let one = |info: &ImageInfo| {
        let mut value = json!({
            "path": info.path.to_string_lossy(),
            "format": info.format.name(),
            "virtual_size": info.virtual_size,
            "file_size": info.file_size,
            "disk_size": info.disk_size,
        });
        if let (Some(qcow2), Some(object)) = (&info.qcow2, value.as_object_mut()) {
            object.insert(
                "qcow2".into(),
                json!({
                    "version": qcow2.version,
                    "cluster_size": qcow2.cluster_size,
                    "refcount_bits": qcow2.refcount_bits,
                    "lazy_refcounts": qcow2.lazy_refcounts,
                    "dirty": qcow2.dirty,
                    "corrupt": qcow2.corrupt,
                    "bitmaps": qcow2.bitmaps,
                    "backing": qcow2.backing,
                    "backing_format": qcow2.backing_format,
                    "snapshots": qcow2.snapshots,
                }),
            );
        }
        value
    };
    Value::Array(chain.iter().map(one).collect())
}

pub(super) fn report(report: &CheckReport) -> String {
    let mut out: String = report.problems.iter().map(|problem| format!("{problem}\n")).collect();
    if report.repaired > 0 {
        let _ = writeln!(out, "{} problems were repaired.", report.repaired);
    }
    let _ = match (report.corruptions, report.leaks) {
        (0, 0) => writeln!(out, "The image is clean."),
        (0, leaks) => writeln!(out, "{leaks} clusters are leaked: lost space, no harm."),
        (corruptions, leaks) => {
            writeln!(out, "The image is damaged: {corruptions} corruptions, {leaks} leaks.")
        }
    };
    let _ = writeln!(
        out,
        "{} of {} clusters are allocated, {} of them compressed; the image ends at {} bytes.",
        report.allocated_clusters, report.total_clusters, report.compressed_clusters, report.image_end
    );
    out
}

pub(super) fn report_json(report: &CheckReport) -> Value {
    json!({
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "repaired": report.repaired,
        "problems": report.problems,
        "allocated_clusters": report.allocated_clusters,
        "compressed_clusters": report.compressed_clusters,
        "total_clusters": report.total_clusters,
        "image_end": report.image_end,
    })
}
