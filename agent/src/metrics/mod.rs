//! What a sandbox uses, over time: three rings of points, the newest of each kind.
//!
//! | ring | points | of |
//! |---|---|---|
//! | 10 minutes | 600 | one sample, a second apart |
//! | 2 hours | 240 | the mean of 30 s |
//! | 24 hours | 288 | the mean of 5 min |
//!
//! Holds: a sandbox costs 36 KiB at most, however long it lives. Plain functions with the time as an argument; [`sampler`] takes the
//! samples.

pub mod sampler;

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

/// One sample, or the mean of some.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// When, in seconds since 1970; of a mean, when its time began.
    pub unix: i64,
    /// Percent of the sandbox's vCPUs, 0 to 100.
    pub cpu_percent: f64,
    /// Bytes of memory in use, as the guest says.
    pub memory: i64,
    /// Bytes in use on the root filesystem, as the guest says.
    pub disk: i64,
}

/// All points of a sandbox.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Points {
    /// Of ten minutes.
    pub minutes: Vec<Point>,
    /// Of two hours.
    pub hours: Vec<Point>,
    /// Of a day.
    pub day: Vec<Point>,
}

/// A span of time that can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    seconds: i64,
    ring: Ring,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ring {
    Minutes,
    Hours,
    Day,
}

impl Range {
    /// A span by its name in the protocol.
    pub fn of_name(name: &str) -> Option<Self> {
        let (seconds, ring) = match name {
            "5m" => (5 * 60, Ring::Minutes),
            "10m" => (10 * 60, Ring::Minutes),
            "1h" => (3600, Ring::Hours),
            "2h" => (2 * 3600, Ring::Hours),
            "6h" => (6 * 3600, Ring::Day),
            "12h" => (12 * 3600, Ring::Day),
            "24h" => (24 * 3600, Ring::Day),
            _ => return None,
        };
        Some(Self { seconds, ring })
    }
}

/// The rings of one sandbox.
#[derive(Debug)]
pub struct Rings(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    minutes: VecDeque<Point>,
    hours: Means,
    day: Means,
}

impl Default for Rings {
    fn default() -> Self {
        Self(Mutex::new(Inner {
            minutes: VecDeque::new(),
            hours: Means::new(30, 240),
            day: Means::new(300, 288),
        }))
    }
}

/// Samples that the first ring holds.
const MINUTES: usize = 600;

impl Rings {
    /// Adds a sample.
    pub fn add(&self, point: Point) {
        let mut inner = self.lock();
        push(&mut inner.minutes, point, MINUTES);
        inner.hours.add(point);
        inner.day.add(point);
    }

    /// The points of a span that ends at `now`, oldest first.
    pub fn range(&self, range: Range, now: i64) -> Vec<Point> {
        let inner = self.lock();
        let points = match range.ring {
            Ring::Minutes => inner.minutes.iter().copied().collect(),
            Ring::Hours => inner.hours.points(),
            Ring::Day => inner.day.points(),
        };
        let is_in = |point: &Point| point.unix > now - range.seconds;
        points.into_iter().filter(is_in).collect()
    }

    /// Takes all points out.
    pub fn take(&self) -> Points {
        let mut inner = self.lock();
        let points = Points {
            minutes: inner.minutes.iter().copied().collect(),
            hours: inner.hours.points(),
            day: inner.day.points(),
        };
        inner.minutes.clear();
        inner.hours.clear();
        inner.day.clear();
        points
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("nothing panics while it holds this")
    }
}

fn push(ring: &mut VecDeque<Point>, point: Point, most: usize) {
    if ring.len() == most {
        ring.pop_front();
    }
    ring.push_back(point);
}

/// A ring of means, and the one that is being made.
#[derive(Debug)]
struct Means {
    seconds: i64,
    most: usize,
    ring: VecDeque<Point>,
    current: Option<Sum>,
}

/// The sum of samples of one span.
#[derive(Debug, Clone, Copy)]
struct Sum {
    begin: i64,
    count: u32,
    cpu_percent: f64,
    memory: f64,
    disk: f64,
}

impl Sum {
    fn mean(self) -> Point {
        let count = f64::from(self.count);
        Point {
            unix: self.begin,
            cpu_percent: self.cpu_percent / count,
            memory: (self.memory / count) as i64,
            disk: (self.disk / count) as i64,
        }
    }
}

impl Means {
    fn new(seconds: i64, most: usize) -> Self {
        Self {
            seconds,
            most,
            ring: VecDeque::new(),
            current: None,
        }
    }

    fn add(&mut self, point: Point) {
        let begin = point.unix - point.unix.rem_euclid(self.seconds);
        if let Some(done) = self.current.take_if(|sum| sum.begin != begin) {
            push(&mut self.ring, done.mean(), self.most);
        }
        let sum = self.current.get_or_insert(Sum {
            begin,
            count: 0,
            cpu_percent: 0.0,
            memory: 0.0,
            disk: 0.0,
        });
        sum.count += 1;
        sum.cpu_percent += point.cpu_percent;
        sum.memory += point.memory as f64;
        sum.disk += point.disk as f64;
    }

    /// With the one that is being made: a sandbox of a minute has something to show for its first hour.
    fn points(&self) -> Vec<Point> {
        let current = self.current.map(Sum::mean);
        self.ring.iter().copied().chain(current).collect()
    }

    fn clear(&mut self) {
        self.ring.clear();
        self.current = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(unix: i64) -> Point {
        Point {
            unix,
            cpu_percent: (unix % 100) as f64,
            memory: unix * 10,
            disk: 5,
        }
    }

    fn names(points: &[Point]) -> Vec<i64> {
        points.iter().map(|point| point.unix).collect()
    }

    #[test]
    fn each_ring_holds_its_time_and_no_more() {
        let rings = Rings::default();
        let day = 2 * 86_400;
        (0..day).for_each(|unix| rings.add(point(unix)));
        let Points {
            minutes,
            hours,
            day: means,
        } = rings.take();
        assert_eq!((minutes.len(), hours.len(), means.len()), (600, 241, 289));
        assert_eq!(minutes.first().map(|point| point.unix), Some(day - 600));
        assert_eq!(hours.first().map(|point| point.unix), Some(day - 30 - 7200));
        assert_eq!(means.first().map(|point| point.unix), Some(day - 300 - 86_400));
        assert_eq!(rings.take(), Points::default(), "taken out");
    }

    #[test]
    fn a_mean_is_of_its_span_alone() {
        let rings = Rings::default();
        (60..90).for_each(|unix| rings.add(point(unix)));
        rings.add(point(90));
        let hours = rings.take().hours;
        assert_eq!(names(&hours), [60, 90]);
        assert_eq!((hours[0].cpu_percent, hours[0].memory, hours[0].disk), (74.5, 745, 5));
        assert_eq!((hours[1].cpu_percent, hours[1].memory), (90.0, 900));
    }

    #[test]
    fn a_range_ends_now_and_is_of_the_protocol() {
        let rings = Rings::default();
        (0..1000).for_each(|unix| rings.add(point(unix)));
        for (name, first, count) in [("5m", 700, 300), ("10m", 400, 600), ("1h", 0, 34), ("24h", 0, 4)] {
            let points = rings.range(Range::of_name(name).expect("a range"), 999);
            assert_eq!((points[0].unix, points.len()), (first, count), "{name}");
        }
        for name in ["", "5", "5M", "3h", "10m ", "1d"] {
            assert_eq!(Range::of_name(name), None, "{name:?}");
        }
    }

    #[test]
    fn a_clock_that_goes_back_loses_nothing() {
        let rings = Rings::default();
        for unix in [1000, 1001, 400, 401] {
            rings.add(point(unix));
        }
        let points = rings.take();
        assert_eq!(points.minutes.len(), 4);
        assert_eq!(names(&points.hours), [990, 390]);
    }
}
