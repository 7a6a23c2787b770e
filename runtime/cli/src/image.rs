//! Has an image pulled, and shows how it goes: a bar per layer on a terminal, a line per layer elsewhere.

use std::collections::HashMap;
use std::io::IsTerminal;

use clap::ValueEnum;
use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};
use podvisor_proto::{control, cri};

use crate::client::{self, ClientError, Daemon};

/// When to pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pull {
    /// When the image is not there.
    Missing,
    /// Always: the tag may have moved.
    Always,
    /// Never.
    Never,
}

/// Why there is no image to run.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Not there, and not to be pulled.
    #[error("image {0:?} is not here, and --pull=never")]
    Absent(String),
    /// The pull ended without a result.
    #[error("podvisord ended the pull of {0:?} without a result")]
    Ended(String),
    /// podvisord refused.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// The id of `image`, which is pulled first if `when` says so.
pub async fn ensure(
    daemon: &Daemon,
    image: &str,
    when: Pull,
    quiet: bool,
) -> Result<String, ImageError> {
    if when != Pull::Always {
        if let Some(id) = present(daemon, image).await? {
            return Ok(id);
        }
        if when == Pull::Never {
            return Err(ImageError::Absent(image.to_owned()));
        }
    }
    pull(daemon, image, quiet).await
}

async fn present(daemon: &Daemon, image: &str) -> Result<Option<String>, ClientError> {
    let request = cri::ImageStatusRequest {
        image: Some(cri::ImageSpec {
            image: image.to_owned(),
            ..Default::default()
        }),
        verbose: false,
    };
    let mut images = daemon.images.clone();
    Ok(images
        .image_status(client::within(client::CALL, request))
        .await
        .map_err(client::failed("ImageStatus"))?
        .into_inner()
        .image
        .map(|image| image.id))
}

/// Pulls without a deadline of its own: podvisord gives a registry up that says nothing, and a slow
/// one is shown.
async fn pull(daemon: &Daemon, image: &str, quiet: bool) -> Result<String, ImageError> {
    let request = control::PullRequest {
        image: image.to_owned(),
    };
    let mut control = daemon.control.clone();
    let mut messages = control
        .pull(request)
        .await
        .map_err(client::failed("Pull"))?
        .into_inner();
    let mut display = Display::new(image, quiet);
    while let Some(progress) = messages.message().await.map_err(client::failed("Pull"))? {
        if !progress.image_ref.is_empty() {
            return Ok(progress.image_ref);
        }
        display.update(&progress);
    }
    Err(ImageError::Ended(image.to_owned()))
}

enum Display {
    Quiet,
    Bars {
        all: MultiProgress,
        layers: HashMap<String, ProgressBar>,
    },
    /// The layers that were reported complete.
    Lines(HashMap<String, bool>),
}

impl Display {
    fn new(image: &str, quiet: bool) -> Self {
        if quiet {
            return Self::Quiet;
        }
        eprintln!("pulling {image}");
        if std::io::stderr().is_terminal() {
            Self::Bars {
                all: MultiProgress::new(),
                layers: HashMap::new(),
            }
        } else {
            Self::Lines(HashMap::new())
        }
    }

    fn update(&mut self, progress: &control::PullProgress) {
        if progress.layer.is_empty() {
            return;
        }
        let complete = progress.total > 0 && progress.done >= progress.total;
        match self {
            Self::Quiet => {}
            Self::Bars { all, layers } => {
                let bar = layers
                    .entry(progress.layer.clone())
                    .or_insert_with(|| all.add(layer_bar(&progress.layer, progress.total)));
                bar.set_length(progress.total);
                bar.set_position(progress.done);
                if complete && !bar.is_finished() {
                    bar.finish();
                }
            }
            Self::Lines(reported) => {
                let before = reported.entry(progress.layer.clone()).or_insert(false);
                if complete && !*before {
                    *before = true;
                    eprintln!(
                        "  {} {}",
                        short_digest(&progress.layer),
                        HumanBytes(progress.total)
                    );
                }
            }
        }
    }
}

fn layer_bar(layer: &str, total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "  {prefix} {bar:30.green/dim} {binary_bytes:>10} / {binary_total_bytes:<10} {binary_bytes_per_sec:>12}",
    )
    .unwrap_or_else(|_| ProgressStyle::default_bar())
    .progress_chars("█▌░");
    ProgressBar::new(total)
        .with_style(style)
        .with_prefix(short_digest(layer).to_owned())
}

/// The first twelve digits, without the algorithm.
fn short_digest(digest: &str) -> &str {
    let digits = digest.split_once(':').map_or(digest, |(_, digits)| digits);
    digits.get(..12).unwrap_or(digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_cut_to_what_people_compare() {
        assert_eq!(short_digest("sha256:0123456789abcdef"), "0123456789ab");
        assert_eq!(short_digest("odd"), "odd");
    }

    #[test]
    fn a_layer_is_reported_once() {
        let mut display = Display::Lines(HashMap::new());
        let mut progress = control::PullProgress {
            layer: "sha256:aa".into(),
            done: 1,
            total: 2,
            image_ref: String::new(),
        };
        display.update(&progress);
        progress.done = 2;
        display.update(&progress);
        display.update(&progress);
        let Display::Lines(reported) = display else {
            panic!("not lines");
        };
        assert_eq!(
            reported.into_iter().collect::<Vec<_>>(),
            [("sha256:aa".to_owned(), true)]
        );
    }
}
