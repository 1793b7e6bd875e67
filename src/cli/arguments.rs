//! What the command line may say.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use tidegate::{
    config::{ConfigError, Rights, Sources, parse_duration},
    subject::Filter,
};

const AFTER_HELP: &str = "\
Without a command it runs the gateway; without --nats on a broker of its own, in memory.

Settings come from the file, the environment and flags, and the last one wins. They have the same names everywhere:
sse.heartbeat is TIDEGATE_SSE__HEARTBEAT and --set sse.heartbeat=5s. `tidegate config` prints them all.

Signals:
  TERM, INT  drain: not ready, then streams end one by one, then exit; once more: exit at once
  HUP        read the settings again: keys, policies, limits and what is logged; no stream notices

Exit codes:
    0  ended in order
   64  the command line is wrong
   66  a file that the settings name can't be read, or the file of settings itself
   69  NATS can't be reached, or has no JetStream
   70  a part that can't be made anew has ended: a defect
   71  an address is taken, or this machine has no more threads
   76  the NATS server or the stream does not fit
   77  NATS does not let the user in, or not do what is needed
   78  the settings can't be used
  130  a second signal cut the drain short";

/// Streams events from NATS to browsers, curl and anything else that speaks HTTP, exactly from where they left off.
#[derive(Parser)]
#[command(version, after_help = AFTER_HELP)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub settings: Settings,
}

#[derive(Args)]
pub struct Settings {
    /// A file of settings (TOML); src/config.default.toml explains all of them
    #[arg(long, global = true, value_name = "FILE", env = "TIDEGATE_CONFIG")]
    pub config: Option<PathBuf>,
    /// Where clients connect [default: 127.0.0.1:8080]
    #[arg(long, global = true, value_name = "ADDRESS")]
    pub listen: Option<String>,
    /// Where metrics and health are [default: 127.0.0.1:9090]
    #[arg(long, global = true, value_name = "ADDRESS")]
    pub admin_listen: Option<String>,
    /// The NATS servers to be a gateway of, as in nats://127.0.0.1:4222 [default: an embedded broker]
    #[arg(long, global = true, value_name = "URL")]
    pub nats: Option<String>,
    /// Any setting, as in sse.heartbeat=5s; may be given several times
    #[arg(long, global = true, value_name = "KEY=VALUE", value_parser = setting)]
    pub set: Vec<(String, String)>,
}

#[derive(Subcommand)]
pub enum Command {
    /// Says whether a gateway could start with these settings, by reading keys and asking NATS; changes nothing
    Check,
    /// Prints the settings that are in force and where each comes from, without secrets
    Config,
    /// API keys for backends
    Key {
        #[command(subcommand)]
        command: KeyCommand,
    },
    /// Prints a token for development, made with auth.jwt.secret
    Token {
        /// The token's `sub`
        #[arg(long, value_name = "NAME")]
        sub: Option<String>,
        #[command(flatten)]
        rights: RightsArguments,
        /// How long it is good, as in 90s, 15m or 1h
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = lifetime)]
        expires: Duration,
    },
    /// Prints the man page (roff)
    Man,
    /// Prints completions for a shell
    Completions { shell: Shell },
}

#[derive(Subcommand)]
pub enum KeyCommand {
    /// Prints a new key, and what to put into the configuration for it
    New {
        /// Name of the key
        #[arg(long, default_value = "backend")]
        name: String,
        #[command(flatten)]
        rights: RightsArguments,
    },
}

#[derive(Args)]
pub struct RightsArguments {
    /// What it may read, as in orders.>; may be given several times
    #[arg(long, value_name = "FILTER", value_parser = Filter::parse)]
    pub subscribe: Vec<Filter>,
    /// What it may publish to; may be given several times
    #[arg(long, value_name = "FILTER", value_parser = Filter::parse)]
    pub publish: Vec<Filter>,
}

/// How long a file of settings stays as it is that is not being written, and how often that is looked at.
const SETTLED: Duration = Duration::from_millis(250);
const SETTLED_TRIES: usize = 40;

impl Settings {
    /// Reads a file that may just have been changed: not before it has stopped changing.
    pub async fn read_settled(&self) -> Result<Sources, ConfigError> {
        let text = || self.config.as_ref().map(std::fs::read).transpose().ok();
        for _ in 0..SETTLED_TRIES {
            let before = text();
            tokio::time::sleep(SETTLED).await;
            let sources = self.read();
            if before == text() {
                return sources;
            }
        }
        Err(ConfigError::Rule("the file of settings does not stop changing".into()))
    }

    pub fn read(&self) -> Result<Sources, ConfigError> {
        let named = [("listen", &self.listen), ("admin_listen", &self.admin_listen), ("nats.url", &self.nats)];
        let named = named.into_iter().filter_map(|(key, value)| Some((key, value.clone()?)));
        let set = self.set.iter().map(|(key, value)| (&**key, value.clone()));
        Sources::read(self.config.clone(), named.chain(set).collect())
    }
}

impl From<RightsArguments> for Rights {
    fn from(RightsArguments { subscribe, publish }: RightsArguments) -> Rights {
        Rights { subscribe, publish }
    }
}

fn setting(text: &str) -> Result<(String, String), &'static str> {
    let (key, value) =
        text.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or("write it as in sse.heartbeat=5s")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn lifetime(text: &str) -> Result<Duration, &'static str> {
    parse_duration(text).ok_or("this is no time such as 90s, 15m or 1h")
}
