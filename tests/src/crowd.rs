//! Connections for many streams at a time.

use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use tonic::transport::{Channel, Endpoint};

use crate::server::Server;

/// The client's HTTP/2 library closes a connection on which more small frames wait to be read than half of its window has room for,
/// at about 250 bytes each. A token is such a frame: this is room for 100,000 of them.
const WINDOW_BYTES: u32 = 64 << 20;

/// A client over one of the connections.
pub type Client = InferenceServiceClient<Channel>;

/// Opens connections.
///
/// # Errors
/// When nobody is there.
pub async fn connect(server: &Server, count: u64) -> anyhow::Result<Vec<Client>> {
    let endpoint = Endpoint::from_shared(format!("http://{}", server.address()))?;
    let endpoint = endpoint.initial_connection_window_size(WINDOW_BYTES);
    let mut clients = Vec::new();
    for _ in 0..count {
        clients.push(Client::new(endpoint.connect().await?));
    }
    Ok(clients)
}
