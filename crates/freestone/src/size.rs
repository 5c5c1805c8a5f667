//! Sizes as people write them: `512M`, `4 GiB`, `1.5g`.

/// Bytes in the unit that stands behind a number. All units are powers of 1024, as memory is sold.
fn unit(name: &str) -> Option<u64> {
    Some(match name.to_ascii_lowercase().as_str() {
        "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "" | "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        _ => return None,
    })
}

/// Parses the size of guest memory: whole pages of 4 KiB, at least 1 MiB.
pub(crate) fn parse_memory(text: &str) -> Result<u64, String> {
    let bytes = parse(text)?;
    if bytes < 1 << 20 {
        return Err(format!("{bytes} bytes is too little: a machine needs at least 1M"));
    }
    if bytes % 4096 != 0 {
        return Err(format!("{bytes} bytes is not a whole number of 4 KiB pages"));
    }
    Ok(bytes)
}

/// Parses any size in bytes; a number without a unit counts MiB.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    parse(text)
}

/// Parses bytes in a second: a size that is not 0.
pub(crate) fn parse_rate(text: &str) -> Result<u64, String> {
    match parse(text)? {
        0 => Err("say more than 0, or nothing for no limit".to_owned()),
        bytes => Ok(bytes),
    }
}

/// Parses the size of a disk: whole sectors of 512 bytes; a number without a unit counts bytes.
pub(crate) fn parse_disk(text: &str) -> Result<u64, String> {
    let plain = text.trim().parse::<u64>().ok();
    let bytes = plain.map_or_else(|| parse(text), Ok)?;
    if bytes == 0 || bytes % 512 != 0 {
        return Err(format!("{bytes} bytes is not a whole number of sectors of 512 bytes"));
    }
    Ok(bytes)
}

fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, name) = text.split_at(at);
    let unit =
        unit(name.trim()).ok_or_else(|| format!("{:?} is not a unit: use K, M, G or T", name.trim()))?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let bad = || format!("{text:?} is not a size: write it like 512M or 4G");
    let whole: u64 = whole.parse().map_err(|_| bad())?;
    // The fraction is exact for the few digits that make sense: 1.5G, 0.25T.
    if fraction.len() > 3 || number.ends_with('.') {
        return Err(bad());
    }
    let scale = 10_u64.pow(u32::try_from(fraction.len()).map_err(|_| bad())?);
    let fraction: u64 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| bad())? };
    let too_large = || format!("{text} is more than this machine can address");
    let whole = whole.checked_mul(unit).ok_or_else(too_large)?;
    let part = fraction.checked_mul(unit).ok_or_else(too_large)? / scale;
    whole.checked_add(part).ok_or_else(too_large)
}

/// A size for people: the largest unit that keeps it short.
pub(crate) fn display(bytes: u64) -> String {
    for (shift, name) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >= 1 << shift {
            let whole = bytes >> shift;
            let tenth = ((bytes >> (shift - 10)) & 1023) * 10 / 1024;
            return if tenth == 0 { format!("{whole} {name}") } else { format!("{whole}.{tenth} {name}") };
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("512M", 512 << 20),
            ("64", 64 << 20),
            ("4g", 4 << 30),
            ("4 GiB", 4 << 30),
            ("1.5G", 3 << 29),
            ("0.25T", 1 << 38),
            ("65536K", 64 << 20),
            ("1048576b", 1 << 20),
        ] {
            assert_eq!(parse_memory(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused_with_its_value() {
        for (text, part) in [
            ("0", "0 bytes"),
            ("", "not a size"),
            ("G", "not a size"),
            ("4X", "\"X\" is not a unit"),
            ("-1G", "is not a unit"),
            ("1.5.5G", "not a size"),
            ("1.G", "not a size"),
            ("1000001b", "too little"),
            ("1048577b", "4 KiB pages"),
            ("99999999999999T", "more than this machine can address"),
            ("16777216T", "more than this machine can address"),
        ] {
            let error = parse_memory(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_bare_disk_size_counts_bytes() {
        assert_eq!(parse_disk("1048576"), Ok(1 << 20));
        assert_eq!(parse_disk("4G"), Ok(4 << 30));
        assert!(parse_disk("1000").unwrap_err().contains("1000 bytes"));
        assert!(parse_disk("0").is_err());
    }

    #[test]
    fn sizes_are_shown_short() {
        assert_eq!(display(512), "512 B");
        assert_eq!(display(256 << 20), "256 MiB");
        assert_eq!(display(3 << 29), "1.5 GiB");
    }
}
