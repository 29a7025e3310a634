//! A loaded rank holds the memory that it planned. One test, alone in its process: memory is the process's.

use std::{fs, path::Path, sync::Arc};

use lockstep_proto::shard::{self as pb, load_response::Event, shard_service_server::ShardService};
use lockstep_shard::{
    build_id,
    service::{Shard, load},
};
use tokio_stream::StreamExt;
use tonic::Request;

#[tokio::test]
async fn a_loaded_rank_holds_what_it_planned() {
    let model_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/checkpoints/a");
    let processor = fs::read_to_string(model_dir.join("preprocessor_config.json")).unwrap();
    let processor: serde_json::Value = serde_json::from_str(&processor).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        processor[name].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
    };
    let request = pb::LoadRequest {
        build_id: build_id().into(),
        epoch: 1,
        world_size: 1,
        model_dir: model_dir.display().to_string(),
        device: "cpu".into(),
        dtype: "bf16".into(),
        max_context_tokens: 4096,
        max_step_tokens: 2048,
        max_frame_patches: 4096,
        waiting_pixel_bytes: 8 << 20,
        max_step_sequences: 32,
        kv_capacity_tokens: 65536,
        feature_capacity_tokens: 8192,
        threads: 2,
        image_mean: floats("image_mean"),
        image_std: floats("image_std"),
        loading_ranks: 1,
        group: 9,
        ..Default::default()
    };
    let shard = Shard::new(Arc::new(load::load));
    let mut events = shard.load(Request::new(request)).await.unwrap().into_inner();
    let (mut plan, mut loaded) = (None, false);
    while let Some(response) = events.next().await {
        match response.unwrap().event.unwrap() {
            Event::Plan(told) => plan = Some(told),
            Event::Progress(progress) => assert!(progress.loaded_bytes <= progress.total_bytes),
            Event::Description(description) => loaded = description.vocab_size == 533,
        }
    }
    assert!(loaded);
    let plan = plan.unwrap();
    let pb::MemoryPlan { weights_bytes, kv_bytes, features_bytes, workspace_bytes, .. } = plan;
    let planned = weights_bytes + kv_bytes + features_bytes + workspace_bytes;
    let planned = planned + plan.collective_bytes + plan.media_bytes + plan.process_bytes;
    let held = shard.get_memory(Request::new(pb::GetMemoryRequest {})).await.unwrap().into_inner();
    let held = held.anonymous_bytes + held.shared_bytes;
    eprintln!("planned {planned}, held {held}: {plan:?}");
    assert!(held.abs_diff(planned) * 10 <= planned, "planned {planned}, held {held}: {plan:?}");
}
