//! `runtime.v1.ImageService`.

use std::collections::HashMap;
use std::sync::Arc;

use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use podvisor_image::{Credentials, Image};
use podvisor_proto::cri;
use podvisor_proto::cri::image_service_server::ImageService;
use serde_json::json;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};
use tracing::{Level, instrument};

use super::{answer, lists};
use crate::daemon::{Daemon, now_ns};
use crate::error::{Error, Result};
use crate::heap;
use crate::trace::pull::Layers;

/// Serves CRI's image half.
#[derive(Debug)]
pub struct Images {
    daemon: Arc<Daemon>,
}

impl Images {
    /// A service for `daemon`.
    pub fn new(daemon: Arc<Daemon>) -> Self {
        Self { daemon }
    }

    fn items(
        &self,
        filter: Option<cri::ImageFilter>,
    ) -> impl Iterator<Item = cri::Image> + Send + 'static {
        let wanted = filter.and_then(|filter| filter.image);
        let wanted = wanted.map(|image| image.image).unwrap_or_default();
        let store = &self.daemon.images;
        let found: Vec<_> = if wanted.is_empty() {
            store.list()
        } else {
            store.resolve(&wanted).into_iter().collect()
        };
        found.into_iter().map(|image| cri_image(&image))
    }
}

#[tonic::async_trait]
impl ImageService for Images {
    async fn list_images(
        &self,
        request: Request<cri::ListImagesRequest>,
    ) -> Result<Response<cri::ListImagesResponse>, Status> {
        let images = self.items(request.into_inner().filter).collect();
        answer(Level::DEBUG, Ok(cri::ListImagesResponse { images }))
    }

    async fn stream_images(
        &self,
        request: Request<cri::StreamImagesRequest>,
    ) -> Result<Response<BoxStream<cri::StreamImagesResponse>>, Status> {
        let items = self.items(request.into_inner().filter);
        let message = |images| cri::StreamImagesResponse { images };
        answer(Level::DEBUG, Ok(lists::stream(items, message)))
    }

    #[instrument(skip_all, name = "ImageStatus")]
    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Result<Response<cri::ImageStatusResponse>, Status> {
        let request = request.into_inner();
        let result = image_name(request.image).map(|name| {
            let image = self.daemon.images.resolve(&name);
            cri::ImageStatusResponse {
                info: match &image {
                    Some(image) if request.verbose => info(image),
                    _ => HashMap::new(),
                },
                image: image.as_deref().map(cri_image),
            }
        });
        answer(Level::DEBUG, result)
    }

    #[instrument(skip_all, name = "PullImage", fields(image))]
    async fn pull_image(
        &self,
        request: Request<cri::PullImageRequest>,
    ) -> Result<Response<cri::PullImageResponse>, Status> {
        let request = request.into_inner();
        let result = async {
            let name = image_name(request.image)?;
            tracing::Span::current().record("image", &name);
            let credentials = request.auth.map(credentials).transpose()?.flatten();
            let layers = Layers::default();
            let tell = |progress| layers.tell(&progress);
            let pulled = self.daemon.images.pull(&name, credentials, &tell).await;
            heap::give_back();
            let image = pulled?;
            Ok(cri::PullImageResponse {
                image_ref: image.id.clone(),
            })
        };
        answer(Level::INFO, result.await)
    }

    #[instrument(skip_all, name = "RemoveImage", fields(image))]
    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Result<Response<cri::RemoveImageResponse>, Status> {
        let result = async {
            let name = image_name(request.into_inner().image)?;
            tracing::Span::current().record("image", &name);
            self.daemon.images.remove(&name).await?;
            Ok(cri::RemoveImageResponse {})
        };
        answer(Level::INFO, result.await)
    }

    #[instrument(skip_all, name = "ImageFsInfo")]
    async fn image_fs_info(
        &self,
        _request: Request<cri::ImageFsInfoRequest>,
    ) -> Result<Response<cri::ImageFsInfoResponse>, Status> {
        let images = self.daemon.images.clone();
        let result = tokio::task::spawn_blocking(move || images.usage())
            .await
            .map_err(|_| Error::Cancelled)
            .map(|usage| {
                let filesystem = cri::FilesystemUsage {
                    timestamp: now_ns() as i64,
                    fs_id: Some(cri::FilesystemIdentifier {
                        mountpoint: self.daemon.images_dir().display().to_string(),
                    }),
                    used_bytes: Some(cri::UInt64Value { value: usage.bytes }),
                    inodes_used: Some(cri::UInt64Value {
                        value: usage.inodes,
                    }),
                };
                cri::ImageFsInfoResponse {
                    // Upper layers are on the same file system: one entry, twice (kubelet >= 1.31).
                    image_filesystems: vec![filesystem.clone()],
                    container_filesystems: vec![filesystem],
                }
            });
        answer(Level::DEBUG, result)
    }
}

fn image_name(spec: Option<cri::ImageSpec>) -> Result<String> {
    match spec.map(|spec| spec.image) {
        Some(name) if !name.is_empty() => Ok(name),
        _ => Err(Error::Invalid {
            field: "image.image",
            problem: "must not be empty".into(),
        }),
    }
}

/// Padded or not: both are seen in the wild.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// CRI's credentials: a token if there is one, else name and password, which `auth` may carry as
/// base64 of `name:password` (docker's config.json).
fn credentials(auth: cri::AuthConfig) -> Result<Option<Credentials>> {
    if !auth.registry_token.is_empty() {
        return Ok(Some(Credentials::RegistryToken(auth.registry_token)));
    }
    if !auth.identity_token.is_empty() {
        return Ok(Some(Credentials::IdentityToken(auth.identity_token)));
    }
    if !auth.username.is_empty() {
        return Ok(Some(Credentials::Password {
            username: auth.username,
            password: auth.password,
        }));
    }
    if auth.auth.is_empty() {
        return Ok(None);
    }
    let malformed = || Error::Invalid {
        field: "auth.auth",
        problem: "not base64 of name:password".into(),
    };
    let decoded = BASE64.decode(&auth.auth).map_err(|_| malformed())?;
    let text = String::from_utf8(decoded).map_err(|_| malformed())?;
    let (username, password) = text.split_once(':').ok_or_else(malformed)?;
    Ok(Some(Credentials::Password {
        username: username.to_owned(),
        // docker pads the password with NUL bytes.
        password: password.trim_end_matches('\0').to_owned(),
    }))
}

fn cri_image(image: &Image) -> cri::Image {
    let user = image
        .config
        .config()
        .as_ref()
        .and_then(|config| config.user().clone())
        .unwrap_or_default();
    // "uid[:gid]" or "name[:group]"; no user is root (kubelet's runAsNonRoot check).
    let name = user.split(':').next().unwrap_or_default();
    let uid = if name.is_empty() {
        Some(0)
    } else {
        name.parse().ok()
    };
    cri::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        uid: uid.map(|value| cri::Int64Value { value }),
        username: if uid.is_some() {
            String::new()
        } else {
            name.to_owned()
        },
        spec: Some(cri::ImageSpec {
            image: image.id.clone(),
            ..Default::default()
        }),
        pinned: false,
    }
}

fn info(image: &Image) -> HashMap<String, String> {
    let layers: Vec<_> = image
        .layers
        .iter()
        .map(|layer| json!({ "diffID": layer.diff_id, "bytes": layer.length }))
        .collect();
    HashMap::from([(
        "info".to_owned(),
        json!({ "imageSpec": image.config, "layers": layers }).to_string(),
    )])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(auth: &str) -> Result<Option<Credentials>> {
        credentials(cri::AuthConfig {
            auth: auth.into(),
            ..Default::default()
        })
    }

    #[test]
    fn auth_is_base64_of_name_and_password() {
        let expected = Credentials::Password {
            username: "user".into(),
            password: "pa:ss".into(),
        };
        assert_eq!(
            password("dXNlcjpwYTpzcw==").unwrap(),
            Some(expected.clone())
        );
        assert_eq!(password("dXNlcjpwYTpzcw").unwrap(), Some(expected));
        assert_eq!(password("").unwrap(), None);
        for bad in ["dXNlcg==", "!!!!", "A"] {
            assert!(password(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn tokens_win_over_passwords() {
        let auth = cri::AuthConfig {
            username: "u".into(),
            registry_token: "t".into(),
            ..Default::default()
        };
        let expected = Credentials::RegistryToken("t".into());
        assert_eq!(credentials(auth).unwrap(), Some(expected));
    }
}
