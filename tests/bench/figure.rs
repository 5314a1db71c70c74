//! Figures: what was measured, beside what, and what it should be. Each is one line of JSON behind [`MARK`], which the xtask collects.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How the line of a figure begins.
const MARK: &str = "BENCH ";

/// Times or amounts, in the figure's unit.
#[derive(Debug, Default, Clone)]
pub(crate) struct Samples(pub(crate) Vec<f64>);

impl Samples {
    pub(crate) fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Adds a time in milliseconds.
    pub(crate) fn add_time(&mut self, taken: Duration) {
        self.add(taken.as_secs_f64() * 1000.0);
    }

    /// Times `work`, in milliseconds.
    pub(crate) fn time<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let value = work();
        self.add_time(began.elapsed());
        value
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }

    /// The value that `percent` of all are at or below.
    fn percentile(&self, percent: usize) -> f64 {
        let sorted = self.sorted();
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted[rank - 1]
    }

    /// The one in the middle, or the mean of the two.
    pub(crate) fn median(&self) -> f64 {
        let sorted = self.sorted();
        let middle = sorted.len() / 2;
        let lower = (sorted.len() - 1) / 2;
        f64::midpoint(sorted[lower], sorted[middle])
    }

    fn summary(&self) -> Value {
        json!({
            "min": self.percentile(0),
            "median": self.median(),
            "p99": self.percentile(99),
            "n": self.0.len(),
        })
    }
}

/// What a figure should be, of the medians of subject and baseline.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Goal {
    /// So many times as fast as the baseline, or faster; of times.
    Faster(f64),
    /// No more than so many times the baseline.
    AtMostTimes(f64),
    /// No less than so many times the baseline; of rates.
    AtLeastTimes(f64),
    /// No more than this, in the figure's unit.
    AtMost(f64),
    /// Nothing is asked of it: it says where the time of another figure goes.
    Seen,
}

/// One figure.
#[derive(Debug)]
pub(crate) struct Figure<'a> {
    /// Its name, behind its group's: `host.tools`.
    pub(crate) name: &'a str,
    /// Of subject and baseline.
    pub(crate) unit: &'static str,
    pub(crate) subject: &'a Samples,
    /// What it is measured against, and that one's samples of the same run.
    pub(crate) baseline: Option<(&'a str, &'a Samples)>,
    pub(crate) goal: Goal,
    /// Where the goal may be missed: why, and what would be tried next.
    pub(crate) unmet: &'a str,
}

impl Figure<'_> {
    /// Writes its line.
    pub(crate) fn tell(&self) {
        let median = self.subject.median();
        let of = |baseline: fn(f64, f64) -> f64| {
            let (_, samples) = self.baseline.expect("a goal that is a ratio has a baseline");
            baseline(median, samples.median())
        };
        let (measured, wanted, met) = match self.goal {
            Goal::Faster(times) => {
                let faster = of(|subject, baseline| baseline / subject);
                (
                    format!("{faster:.1} x faster"),
                    format!(">= {times} x faster"),
                    Some(faster >= times),
                )
            }
            Goal::AtMostTimes(times) => {
                let ratio = of(|subject, baseline| subject / baseline);
                (format!("{ratio:.2} x"), format!("<= {times} x"), Some(ratio <= times))
            }
            Goal::AtLeastTimes(times) => {
                let ratio = of(|subject, baseline| subject / baseline);
                (format!("{ratio:.2} x"), format!(">= {times} x"), Some(ratio >= times))
            }
            Goal::AtMost(most) => (
                format!("{median:.2} {}", self.unit),
                format!("<= {most} {}", self.unit),
                Some(median <= most),
            ),
            Goal::Seen => (format!("{median:.2} {}", self.unit), String::new(), None),
        };
        let baseline = self.baseline.map(|(name, samples)| {
            let mut summary = samples.summary();
            summary["of"] = json!(name);
            summary
        });
        tell(json!({
            "figure": self.name,
            "unit": self.unit,
            "subject": self.subject.summary(),
            "baseline": baseline,
            "goal": wanted,
            "measured": measured,
            "met": met,
            "why": (met == Some(false)).then_some(self.unmet),
        }));
    }
}

/// Says that a figure could not be had.
pub(crate) fn not_measured(name: &str, why: &str) {
    tell(json!({ "figure": name, "missing": why }));
}

fn tell(line: Value) {
    println!("{MARK}{line}");
}
