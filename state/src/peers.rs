//! The other state servers, as the registry has them, and channels to them. Whoever asks them owns one.

use std::collections::HashMap;

use crpc::client::{ChannelOptions, connect_lazy};
use crpc::registry::RegistryError;
use proto::state::state_client::StateClient;
use tonic::transport::Channel;

use crate::core::Core;

/// By address.
#[derive(Debug, Default)]
pub struct Peers {
    channels: HashMap<String, StateClient<Channel>>,
}

impl Peers {
    /// Takes those that the registry has now. Channels to them are opened when they are asked first.
    pub async fn find(&mut self, core: &Core) -> Result<(), RegistryError> {
        let Some(registry) = core.peers.get() else { return Ok(()) };
        let servers = registry.list("state").await?;
        let others = servers.iter().filter(|server| server.id != core.config.id());
        let others: Vec<String> = others.map(|server| server.addr.clone()).collect();
        self.channels.retain(|addr, _| others.contains(addr));
        for addr in others {
            if let (false, Ok(channel)) =
                (self.channels.contains_key(&addr), connect_lazy(&addr, &ChannelOptions::default()))
            {
                self.channels.insert(addr, StateClient::new(channel));
            }
        }
        Ok(())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.channels.is_empty()
    }

    /// Address, and what to ask it with.
    pub fn iter(&self) -> impl Iterator<Item = (&str, StateClient<Channel>)> {
        self.channels.iter().map(|(addr, peer)| (addr.as_str(), peer.clone()))
    }
}
