//! Prometheus' text exposition format, version 0.0.4.

use std::fmt::Write;

use shell::control::{MetricFamily, MetricSample, MetricValue};

/// The `Content-Type` of [`render`]'s text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// `families` as text. Histograms, kept in nanoseconds, become seconds.
pub fn render(families: &[MetricFamily]) -> String {
    let mut text = String::new();
    for family in families {
        let Some(first) = family.samples.first() else { continue };
        let kind = match first.value {
            MetricValue::Counter(_) => "counter",
            MetricValue::Gauge(_) => "gauge",
            MetricValue::Histogram { .. } => "histogram",
        };
        let (name, help) = (family.name, family.help.replace('\\', "\\\\").replace('\n', " "));
        write_line(&mut text, format_args!("# HELP {name} {help}"));
        write_line(&mut text, format_args!("# TYPE {name} {kind}"));
        for sample in &family.samples {
            render_sample(&mut text, name, sample);
        }
    }
    text
}

fn render_sample(text: &mut String, name: &str, sample: &MetricSample) {
    match &sample.value {
        MetricValue::Counter(value) => {
            let labels = labels(sample, None);
            write_line(text, format_args!("{name}{labels} {value}"));
        }
        MetricValue::Gauge(value) => {
            let labels = labels(sample, None);
            write_line(text, format_args!("{name}{labels} {value}"));
        }
        MetricValue::Histogram { bounds_ns, counts, sum_ns } => {
            let mut total = 0_u64;
            for (index, count) in counts.iter().enumerate() {
                total = total.saturating_add(*count);
                let bound = bounds_ns.get(index).map_or("+Inf".to_owned(), |ns| seconds(*ns));
                let labels = labels(sample, Some(&bound));
                write_line(text, format_args!("{name}_bucket{labels} {total}"));
            }
            let (labels, sum) = (labels(sample, None), seconds(*sum_ns));
            write_line(text, format_args!("{name}_sum{labels} {sum}"));
            write_line(text, format_args!("{name}_count{labels} {total}"));
        }
    }
}

fn write_line(text: &mut String, line: std::fmt::Arguments<'_>) {
    text.write_fmt(format_args!("{line}\n")).expect("writing to a String cannot fail");
}

/// Nanoseconds as seconds, exactly.
fn seconds(ns: u64) -> String {
    let text = format!("{}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn labels(sample: &MetricSample, bound: Option<&str>) -> String {
    let escape =
        |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let own = sample.labels.iter().map(|(name, value)| (*name, value.as_str()));
    let all: Vec<String> = own
        .chain(bound.map(|bound| ("le", bound)))
        .map(|(name, value)| format!("{name}=\"{}\"", escape(value)))
        .collect();
    if all.is_empty() { String::new() } else { format!("{{{}}}", all.join(",")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_text() {
        let sample = |labels, value| MetricSample { labels, value };
        let families = [
            MetricFamily {
                name: "holdfast_requests_total",
                help: "Requests.",
                samples: vec![
                    sample(vec![("volume", "a\"b".to_owned())], MetricValue::Counter(7)),
                    sample(vec![], MetricValue::Counter(1)),
                ],
            },
            MetricFamily { name: "holdfast_none", help: "None.", samples: vec![] },
            MetricFamily {
                name: "holdfast_latency_seconds",
                help: "Latency.",
                samples: vec![sample(
                    vec![("stage", "log".to_owned())],
                    MetricValue::Histogram {
                        bounds_ns: &[50_000, 1_000_000],
                        counts: vec![2, 3, 1],
                        sum_ns: 4_000_000_100,
                    },
                )],
            },
        ];
        let expected = "\
# HELP holdfast_requests_total Requests.
# TYPE holdfast_requests_total counter
holdfast_requests_total{volume=\"a\\\"b\"} 7
holdfast_requests_total 1
# HELP holdfast_latency_seconds Latency.
# TYPE holdfast_latency_seconds histogram
holdfast_latency_seconds_bucket{stage=\"log\",le=\"0.00005\"} 2
holdfast_latency_seconds_bucket{stage=\"log\",le=\"0.001\"} 5
holdfast_latency_seconds_bucket{stage=\"log\",le=\"+Inf\"} 6
holdfast_latency_seconds_sum{stage=\"log\"} 4.0000001
holdfast_latency_seconds_count{stage=\"log\"} 6
";
        assert_eq!(render(&families), expected);
    }
}
