//! Statistics of interleaved rounds: medians, and ratios of what ran side by side.

/// The median of `values`; NaN if there are none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.get(middle), sorted.len() % 2) {
        (Some(&high), 1) => high,
        (Some(&high), _) => match middle.checked_sub(1).and_then(|i| sorted.get(i)) {
            Some(&low) => f64::midpoint(low, high),
            None => high,
        },
        (None, _) => f64::NAN,
    }
}

/// The value below which `percent` of 100 values are; NaN if there are none.
pub fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted.get((last * percent.min(100) + 50) / 100).copied().unwrap_or(f64::NAN)
}

/// The median of `values[i] / floor[i]`: each round is compared with the floor that ran right beside it, so that a host that
/// slows down for a while slows both.
pub fn ratio(values: &[f64], floor: &[f64]) -> f64 {
    let ratios: Vec<f64> = values.iter().zip(floor).map(|(value, floor)| value / floor).collect();
    median(&ratios)
}

/// All items, but from another one on, so that nobody is always first.
pub trait CycleFrom: Iterator + Sized {
    /// All of them, from number `first` on.
    fn cycle_from(self, first: usize) -> impl Iterator<Item = Self::Item> {
        let mut items: Vec<_> = self.collect();
        let first = first % items.len().max(1);
        items.rotate_left(first);
        items.into_iter()
    }
}

impl<I: Iterator> CycleFrom for I {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle_value_or_the_mean_of_both() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn percentiles_reach_from_the_least_to_the_greatest() {
        let values = [5.0, 1.0, 3.0];
        assert_eq!([0, 50, 100].map(|p| percentile(&values, p)), [1.0, 3.0, 5.0]);
    }

    #[test]
    fn ratio_compares_each_round_with_its_own_floor() {
        assert_eq!(ratio(&[2.0, 20.0, 200.0], &[1.0, 10.0, 100.0]), 2.0);
    }
}
