//! Samples and what is said of them.

use serde::{Deserialize, Serialize};

/// What a number counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    /// Milliseconds.
    #[serde(rename = "ms")]
    Milliseconds,
    /// Mebibytes.
    #[serde(rename = "MiB")]
    Mebibytes,
    /// Mebibytes a second.
    #[serde(rename = "MiB/s")]
    MebibytesPerSecond,
    /// Just how many.
    #[serde(rename = "")]
    Count,
}

impl Unit {
    /// Its symbol.
    pub fn symbol(self) -> &'static str {
        match self {
            Self::Milliseconds => "ms",
            Self::Mebibytes => "MiB",
            Self::MebibytesPerSecond => "MiB/s",
            Self::Count => "",
        }
    }
}

/// A series of samples in a few numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// `group/what`.
    pub name: String,
    /// Of all numbers here but `count`.
    pub unit: Unit,
    /// Samples.
    pub count: usize,
    /// The median.
    pub p50: f64,
    /// Nine in ten are not above it.
    pub p90: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

impl Metric {
    /// `None` when there are no samples.
    pub fn of(name: &str, unit: Unit, samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            name: name.to_owned(),
            unit,
            count: sorted.len(),
            p50: percentile(&sorted, 50)?,
            p90: percentile(&sorted, 90)?,
            min: *sorted.first()?,
            max: *sorted.last()?,
        })
    }
}

/// Nearest rank: the least sample that at least `percent` of all are not above.
fn percentile(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

/// Named series, in the order in which they began.
#[derive(Debug, Default)]
pub struct Samples {
    series: Vec<(String, Unit, Vec<f64>)>,
}

impl Samples {
    /// Adds a sample to a series.
    pub fn add(&mut self, name: impl Into<String>, unit: Unit, value: f64) {
        let name = name.into();
        match self.series.iter_mut().find(|series| series.0 == name) {
            Some(series) => series.2.push(value),
            None => self.series.push((name, unit, vec![value])),
        }
    }

    /// Adds all samples of another, under their names.
    pub fn append(&mut self, other: Self) {
        for (name, unit, values) in other.series {
            for value in values {
                self.add(name.clone(), unit, value);
            }
        }
    }

    /// The series in numbers.
    pub fn metrics(&self) -> Vec<Metric> {
        self.series
            .iter()
            .filter_map(|(name, unit, values)| Metric::of(name, *unit, values))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let metric = |samples: &[f64]| Metric::of("x", Unit::Milliseconds, samples).unwrap();
        let ten = metric(&[10.0, 1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0, 5.0]);
        assert_eq!(
            (ten.count, ten.p50, ten.p90, ten.min, ten.max),
            (10, 5.0, 9.0, 1.0, 10.0)
        );
        let three = metric(&[3.0, 1.0, 2.0]);
        assert_eq!((three.p50, three.p90), (2.0, 3.0));
        let one = metric(&[7.0]);
        assert_eq!((one.p50, one.p90), (7.0, 7.0));
        assert_eq!(Metric::of("x", Unit::Milliseconds, &[]), None);
    }

    #[test]
    fn series_keep_the_order_they_began_in() {
        let mut all = Samples::default();
        all.add("b", Unit::Milliseconds, 1.0);
        let mut more = Samples::default();
        more.add("a", Unit::Mebibytes, 2.0);
        more.add("b", Unit::Milliseconds, 3.0);
        all.append(more);
        let metrics = all.metrics();
        let seen: Vec<_> = metrics
            .iter()
            .map(|m| (m.name.as_str(), m.unit, m.count))
            .collect();
        assert_eq!(
            seen,
            [("b", Unit::Milliseconds, 2), ("a", Unit::Mebibytes, 1)]
        );
    }
}
