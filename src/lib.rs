pub mod broker;
pub mod config;
pub mod event;
pub mod sse;
pub mod subject;
