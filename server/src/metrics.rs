//! Metrics: what the scheduler counts, for whoever collects it. They are read from the copy that the engine publishes with every
//! step, when they are sent, so that nobody who computes does anything for them.
//!
//! They tell nothing of any one request: the only attribute is the name of a state.

use opentelemetry::KeyValue;
use opentelemetry::metrics::Meter;
use tokio::sync::watch;

use crate::scheduler::Stats;

/// The attribute that tells one number of a [`Level`] from the others.
const STATE: &str = "lockstep.state";

/// How often something happened.
struct Total {
    name: &'static str,
    unit: &'static str,
    says: &'static str,
    of: fn(&Stats) -> u64,
}

/// How many there are of something, by their state.
struct Level {
    name: &'static str,
    unit: &'static str,
    says: &'static str,
    of: fn(&Stats) -> Vec<(&'static str, u32)>,
}

/// They are read in this order: what was found before what was looked up, so that it is never more.
const TOTALS: [Total; 8] = [
    Total {
        name: "lockstep.prefix_cache.tokens.found",
        unit: "{token}",
        says: "Tokens of prompts that earlier requests had computed",
        of: |stats| stats.totals.prefix_tokens_found,
    },
    Total {
        name: "lockstep.prefix_cache.tokens.looked_up",
        unit: "{token}",
        says: "Tokens of prompts that were looked up in the prefix cache",
        of: |stats| stats.totals.prefix_tokens_looked_up,
    },
    Total {
        name: "lockstep.feature_cache.media.found",
        unit: "{medium}",
        says: "Pictures and videos that were encoded for others",
        of: |stats| stats.totals.media_found,
    },
    Total {
        name: "lockstep.feature_cache.media.looked_up",
        unit: "{medium}",
        says: "Pictures and videos that were looked up in the cache of encoded media",
        of: |stats| stats.totals.media_looked_up,
    },
    Total {
        name: "lockstep.tokens.generated",
        unit: "{token}",
        says: "Tokens of answers",
        of: |stats| stats.totals.tokens,
    },
    Total {
        name: "lockstep.steps",
        unit: "{step}",
        says: "Steps of the shards",
        of: |stats| stats.totals.steps,
    },
    Total {
        name: "lockstep.preemptions",
        unit: "{preemption}",
        says: "Sequences that gave their blocks to others, to be computed again",
        of: |stats| stats.totals.preemptions,
    },
    Total {
        name: "lockstep.shards.restarts",
        unit: "{restart}",
        says: "Faults after which the shards were put together again",
        of: |stats| stats.totals.replays,
    },
];

const LEVELS: [Level; 3] = [
    Level {
        name: "lockstep.sequences",
        unit: "{sequence}",
        says: "Answers that are written, and that wait",
        of: |stats| vec![("running", stats.running), ("waiting", stats.waiting)],
    },
    Level {
        name: "lockstep.kv_cache.blocks",
        unit: "{block}",
        says: "Blocks of keys and values",
        of: |stats| {
            let empty = stats.kv_free - stats.kv_kept;
            vec![("free", empty), ("cached", stats.kv_kept), ("held", stats.kv_held)]
        },
    },
    Level {
        name: "lockstep.feature_cache.blocks",
        unit: "{block}",
        says: "Blocks of encoded media",
        of: |stats| {
            let Stats { features_free, features_cached, features_held, .. } = *stats;
            vec![("free", features_free), ("cached", features_cached), ("held", features_held)]
        },
    },
];

/// Has `meter` tell these numbers, and whether steps move.
pub fn register(meter: &Meter, stats: &watch::Receiver<Stats>, moves: &watch::Receiver<bool>) {
    for Total { name, unit, says, of } in TOTALS {
        let stats = stats.clone();
        let counter = meter.u64_observable_counter(name).with_unit(unit).with_description(says);
        let counter = counter.with_callback(move |counter| {
            let count = of(&stats.borrow());
            counter.observe(count, &[]);
        });
        counter.build();
    }
    for Level { name, unit, says, of } in LEVELS {
        let stats = stats.clone();
        let level = meter.i64_observable_up_down_counter(name).with_unit(unit).with_description(says);
        let level = level.with_callback(move |level| {
            let counts = of(&stats.borrow());
            for (state, count) in counts {
                level.observe(count.into(), &[KeyValue::new(STATE, state)]);
            }
        });
        level.build();
    }
    let moves = moves.clone();
    let moving = meter.u64_observable_gauge("lockstep.shards.moving");
    let moving = moving
        .with_unit("1")
        .with_description("1 while steps move, 0 while the shards are put together again");
    moving.with_callback(move |moving| moving.observe((*moves.borrow()).into(), &[])).build();
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use opentelemetry::metrics::MeterProvider;
    use opentelemetry_sdk::error::OTelSdkResult;
    use opentelemetry_sdk::metrics::data::{AggregatedMetrics, MetricData, ResourceMetrics};
    use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
    use opentelemetry_sdk::metrics::{SdkMeterProvider, Temporality};

    use super::*;
    use crate::scheduler::Totals;

    /// Keeps the last numbers, by name and state.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<BTreeMap<String, i64>>>);

    impl PushMetricExporter for Kept {
        async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
            let mut kept = self.0.lock().unwrap();
            for metric in metrics.scope_metrics().flat_map(|scope| scope.metrics()) {
                let mut keep = |attributes: Vec<&KeyValue>, value| {
                    let states = attributes.iter().map(|attribute| format!(" {}", attribute.value));
                    kept.insert(metric.name().to_owned() + &states.collect::<String>(), value);
                };
                match metric.data() {
                    AggregatedMetrics::U64(MetricData::Sum(sum)) => sum
                        .data_points()
                        .for_each(|point| keep(point.attributes().collect(), point.value() as i64)),
                    AggregatedMetrics::I64(MetricData::Sum(sum)) => {
                        sum.data_points().for_each(|point| keep(point.attributes().collect(), point.value()))
                    }
                    AggregatedMetrics::U64(MetricData::Gauge(gauge)) => gauge
                        .data_points()
                        .for_each(|point| keep(point.attributes().collect(), point.value() as i64)),
                    other => panic!("{} is {other:?}", metric.name()),
                }
            }
            Ok(())
        }

        fn force_flush(&self) -> OTelSdkResult {
            Ok(())
        }

        fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
            Ok(())
        }

        fn temporality(&self) -> Temporality {
            Temporality::Cumulative
        }
    }

    fn stats() -> Stats {
        let totals = Totals {
            steps: 101,
            tokens: 102,
            preemptions: 103,
            replays: 104,
            prefix_tokens_looked_up: 105,
            prefix_tokens_found: 106,
            media_looked_up: 107,
            media_found: 108,
        };
        Stats {
            running: 1,
            waiting: 2,
            kv_free: 30,
            kv_kept: 10,
            kv_held: 5,
            kv_total: 35,
            features_free: 6,
            features_cached: 7,
            features_held: 8,
            features_total: 21,
            totals,
        }
    }

    #[test]
    fn every_number_is_told_by_its_name_and_in_the_readme() {
        let kept = Kept::default();
        let provider = SdkMeterProvider::builder().with_periodic_exporter(kept.clone()).build();
        let (publish, published) = watch::channel(stats());
        let (tell, moves) = watch::channel(true);
        register(&provider.meter("lockstep"), &published, &moves);
        provider.force_flush().unwrap();
        let expected = [
            ("lockstep.feature_cache.blocks cached", 7),
            ("lockstep.feature_cache.blocks free", 6),
            ("lockstep.feature_cache.blocks held", 8),
            ("lockstep.feature_cache.media.found", 108),
            ("lockstep.feature_cache.media.looked_up", 107),
            ("lockstep.kv_cache.blocks cached", 10),
            ("lockstep.kv_cache.blocks free", 20),
            ("lockstep.kv_cache.blocks held", 5),
            ("lockstep.preemptions", 103),
            ("lockstep.prefix_cache.tokens.found", 106),
            ("lockstep.prefix_cache.tokens.looked_up", 105),
            ("lockstep.sequences running", 1),
            ("lockstep.sequences waiting", 2),
            ("lockstep.shards.moving", 1),
            ("lockstep.shards.restarts", 104),
            ("lockstep.steps", 101),
            ("lockstep.tokens.generated", 102),
        ];
        let expected: BTreeMap<_, _> =
            expected.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        assert_eq!(*kept.0.lock().unwrap(), expected);

        publish.send_modify(|stats| stats.totals.steps += 1);
        tell.send_replace(false);
        provider.force_flush().unwrap();
        let later = kept.0.lock().unwrap().clone();
        assert_eq!((later["lockstep.steps"], later["lockstep.shards.moving"]), (102, 0));

        let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).unwrap();
        for name in expected.keys().filter_map(|name| name.split(' ').next()) {
            assert!(readme.contains(&format!("`{name}`")), "the README says nothing of {name}");
        }
    }
}
