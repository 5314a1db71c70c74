//! `roost top`: the sandboxes of a host and what they use, again every second.

use std::io::{self, IsTerminal as _};
use std::time::Duration;

use super::client::Client;
use super::{CliError, age, print};
use crate::sandbox::unix_now;
use roost_hostagent::hostagent::v1::{GetSandboxMetricsRequest, ListSandboxesRequest, MetricPoint, SandboxInfo};

/// Seconds between two looks: samples are as far apart.
const PAUSE: Duration = Duration::from_secs(1);
/// Points of a sparkline.
const POINTS: usize = 30;
/// From nothing to all of it.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// To the upper left, and away with what is there.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// Shows the table until it is interrupted; once where nobody watches.
pub(super) async fn top(client: &Client) -> Result<(), CliError> {
    let is_watched = io::stdout().is_terminal();
    loop {
        let listing = client
            .list_sandboxes(ListSandboxesRequest::default())
            .await?
            .into_owned();
        let mut text = format!(
            "{:<30} {:<9} {:>6} {:<POINTS$} {:>10} {:>10} {:>6}\n",
            "ID", "STATUS", "CPU", "", "MEMORY", "DISK", "AGE"
        );
        for sandbox in &listing.sandboxes {
            let request = GetSandboxMetricsRequest {
                sandbox_id: sandbox.sandbox_id.clone(),
                range: "5m".to_owned(),
                ..GetSandboxMetricsRequest::default()
            };
            // One that has gone since, or says nothing yet, is shown without.
            let points = client
                .get_sandbox_metrics(request)
                .await
                .map(|answer| answer.into_owned().points);
            text.push_str(&line(sandbox, &points.unwrap_or_default()));
        }
        for sandbox in &listing.paused_sandboxes {
            text.push_str(&line(sandbox, &[]));
        }
        if !is_watched {
            return print(format_args!("{text}"));
        }
        print(format_args!("{CLEAR}{text}"))?;
        tokio::time::sleep(PAUSE).await;
    }
}

fn line(sandbox: &SandboxInfo, points: &[MetricPoint]) -> String {
    let (cpu, memory, disk) = match points.last() {
        Some(point) => (
            format!("{:.0} %", point.cpu_pct),
            mebibytes(point.mem_bytes),
            mebibytes(point.disk_bytes),
        ),
        None => Default::default(),
    };
    let latest = &points[points.len().saturating_sub(POINTS)..];
    let since = age(unix_now().saturating_sub(sandbox.created_at_unix));
    format!(
        "{:<30} {:<9} {cpu:>6} {:<POINTS$} {memory:>10} {disk:>10} {since:>6}\n",
        sandbox.sandbox_id,
        sandbox.status,
        sparkline(latest.iter().map(|point| point.cpu_pct)),
    )
}

fn mebibytes(bytes: i64) -> String {
    format!("{} MiB", bytes.max(0) >> 20)
}

/// Percents as bars.
fn sparkline(percents: impl Iterator<Item = f64>) -> String {
    let bar = |percent: f64| {
        let step = (percent.clamp(0.0, 100.0) / 100.0 * (BARS.len() - 1) as f64).round();
        BARS[step as usize]
    };
    percents.map(bar).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sparkline_goes_from_nothing_to_all() {
        assert_eq!(
            sparkline([0.0, 50.0, 100.0, 1000.0, -1.0, f64::NAN].into_iter()),
            "▁▅██▁▁"
        );
    }
}
