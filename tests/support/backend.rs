//! The one place that says which brokers the suite runs on.

use super::{gateway::Launch, nats::NatsServer};

/// The broker that a test's gateways run on. It lives as long as the test.
pub enum Backend {
    Embedded,
    Nats(NatsServer),
}

impl Backend {
    pub fn embedded() -> Backend {
        Backend::Embedded
    }

    pub fn nats() -> Backend {
        Backend::Nats(NatsServer::start())
    }

    /// Drops all but the last events of the stream, so many. (The embedded broker does with `embedded.events`.)
    pub fn keep_only(&self, events: usize) {
        let Backend::Nats(server) = self else { return };
        let answer = server.ask("$JS.API.STREAM.PURGE.EVENTS", &format!("{{\"keep\":{events}}}"));
        assert!(answer.contains("\"success\":true"), "{answer}");
    }

    /// A gateway on this broker, to be configured and started.
    pub fn gateway(&self) -> Launch {
        match self {
            Backend::Embedded => Launch::new(),
            Backend::Nats(server) => Launch::new().flag("--nats", &format!("nats://{}", server.address())),
        }
    }
}

/// Makes a test of each of these functions for every broker: `fn(broker: Backend)`.
#[macro_export]
macro_rules! on_every_broker {
    ($($(#[$attribute:meta])* $promise:ident),* $(,)?) => {
        $crate::on_every_broker!(@module embedded: $($(#[$attribute])* $promise),*);
        $crate::on_every_broker!(@module nats: $($(#[$attribute])* $promise),*);
    };
    (@module $broker:ident: $($(#[$attribute:meta])* $promise:ident),*) => {
        mod $broker {
            $(
                #[test]
                $(#[$attribute])*
                fn $promise() {
                    super::$promise($crate::support::backend::Backend::$broker());
                }
            )*
        }
    };
}
