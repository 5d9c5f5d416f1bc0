//! crun-gateway: one account's 15 TaskInfo queries a second serve a whole company.

pub mod account;
pub mod budget;
pub mod config;
pub mod error;
pub mod flight;
pub mod metrics;
pub mod outcome;
pub mod stored;
pub mod task;
pub mod upstream;
