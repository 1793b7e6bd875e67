use super::*;
pub struct Nats;
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct StartError;
impl Nats {
    pub async fn connect(_: &crate::config::Nats, _: &crate::config::History, _: usize) -> Result<Nats, StartError> {
        Err(StartError)
    }
}
#[async_trait]
impl Broker for Nats {
    async fn publish(&self, _: Publication) -> Result<Acknowledgement, PublishError> {
        todo!()
    }
    async fn live(&self, _: &Filter) -> Result<Hints, BrokerError> {
        todo!()
    }
    async fn read(&self, _: Read) -> Result<Page, BrokerError> {
        todo!()
    }
    async fn last(&self, _: &[Subject]) -> Result<Option<LastKnown>, BrokerError> {
        todo!()
    }
    async fn bounds(&self) -> Result<Bounds, BrokerError> {
        todo!()
    }
    fn doubts(&self) -> watch::Receiver<u64> {
        todo!()
    }
    fn health(&self) -> Health {
        todo!()
    }
    fn describe(&self) -> String {
        todo!()
    }
}
