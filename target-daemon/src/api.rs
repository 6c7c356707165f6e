//! The HTTP API on a Unix socket, and `/metrics`.
//!
//! Handlers hand the work to tokio's blocking threads, since the store and the data plane block.
//! The document at `/v1/openapi.json` describes everything here.

mod types;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use cluster::lease::AcquireError;
use cluster::volumes::FindError;
use cluster::{StoreError, StoreErrorKind};
use shell::control::{ControlError, OpenError, Opening};
use utoipa::OpenApi;

use crate::config::{ExportConfig, QUEUES_DEFAULT, QUEUES_MAX};
use crate::daemon::Parts;
use crate::exports::{ExportError, ExportView};
use crate::heads::HeadError;
use crate::metrics;

use types::StoreView;
pub use types::{
    DrainHead, DrainReply, ErrorReply, ExportReply, ExportRequest, ExportState, HeadReply,
    HealthReply, HealthState, MemberReply, PoolReply, ReplicaReply, ServerReply, StatusReply,
    StoreReply,
};

/// How long the data plane may take to describe itself.
const PLANE_WAIT: Duration = Duration::from_secs(2);
/// How long adding an export waits for its head, at most.
const OPEN_WAIT_MAX_MS: u64 = 60_000;

#[derive(OpenApi)]
#[openapi(
    info(title = "holdfastd", description = "A Holdfast storage server's own API."),
    paths(status, health, list_exports, add_export, remove_export, prometheus)
)]
struct Document;

/// The API's description.
pub fn openapi() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

pub(crate) fn router(parts: Arc<Parts>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/health", get(health))
        .route("/v1/exports", get(list_exports).post(add_export).delete(remove_export))
        .route("/v1/openapi.json", get(|| async { Json(openapi()) }))
        .route("/metrics", get(prometheus))
        .fallback(async || {
            Failure::new(
                StatusCode::NOT_FOUND,
                "no_such_path",
                "no such path; see /v1/openapi.json",
            )
        })
        .method_not_allowed_fallback(async || {
            Failure::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "no_such_method",
                "no such method here; see /v1/openapi.json",
            )
        })
        .with_state(parts)
}

/// An answer that is an error.
struct Failure {
    status: StatusCode,
    reply: ErrorReply,
}

impl Failure {
    fn new(status: StatusCode, code: &str, error: impl Into<String>) -> Self {
        Self { status, reply: ErrorReply { code: code.to_owned(), error: error.into() } }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.status, Json(self.reply)).into_response()
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "store", error.to_string())
    }
}

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Self {
        let (status, code) = match &error {
            ControlError::Deadline { .. } => (StatusCode::GATEWAY_TIMEOUT, "deadline"),
            ControlError::Stopped => (StatusCode::SERVICE_UNAVAILABLE, "stopped"),
            ControlError::HandedOver => (StatusCode::SERVICE_UNAVAILABLE, "handed_over"),
            ControlError::Socket { .. } => (StatusCode::CONFLICT, "socket"),
            ControlError::Limit { .. } | ControlError::NoSpace { .. } => {
                (StatusCode::INSUFFICIENT_STORAGE, "limit")
            }
            ControlError::NoPool
            | ControlError::PoolFailed { .. }
            | ControlError::ReplicaMismatch { .. }
            | ControlError::NoHead(_)
            | ControlError::HeadExists { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "data_plane"),
        };
        Self::new(status, code, error.to_string())
    }
}

impl From<ExportError> for Failure {
    fn from(error: ExportError) -> Self {
        let text = error.to_string();
        let (status, code) = match error {
            ExportError::Find(FindError::NotFound(_)) => (StatusCode::NOT_FOUND, "no_volume"),
            ExportError::NoExport(_) => (StatusCode::NOT_FOUND, "no_export"),
            ExportError::Socket(_) | ExportError::SocketTaken { .. } => {
                (StatusCode::CONFLICT, "socket")
            }
            ExportError::Draining => (StatusCode::CONFLICT, "draining"),
            ExportError::TooMany => (StatusCode::INSUFFICIENT_STORAGE, "limit"),
            ExportError::Find(FindError::Store(error)) => return error.into(),
            ExportError::Control(error) => return error.into(),
            ExportError::Head(error) => return head_failure(error, text),
        };
        Self::new(status, code, text)
    }
}

fn head_failure(error: HeadError, text: String) -> Failure {
    let (status, code) = match error {
        HeadError::Acquire(AcquireError::Held { .. }) => (StatusCode::CONFLICT, "held"),
        HeadError::Acquire(AcquireError::Provisioning { .. }) => {
            (StatusCode::CONFLICT, "provisioning")
        }
        HeadError::Acquire(
            AcquireError::Deleted { .. }
            | AcquireError::Store(StoreError { kind: StoreErrorKind::NoVolume(_), .. }),
        ) => (StatusCode::NOT_FOUND, "no_volume"),
        HeadError::Acquire(AcquireError::Store(error)) | HeadError::Store(error) => {
            return error.into();
        }
        HeadError::Superseded { .. } => (StatusCode::CONFLICT, "superseded"),
        HeadError::Open { .. } | HeadError::NotClosed { .. } => {
            (StatusCode::INTERNAL_SERVER_ERROR, "data_plane")
        }
    };
    Failure::new(status, code, text)
}

/// Runs `work` where it may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Failure::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            format!("the request's thread failed: {error}"),
        )),
    }
}

/// Everything that the server knows of itself.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = StatusReply)))]
async fn status(State(parts): State<Arc<Parts>>) -> Result<Json<StatusReply>, Failure> {
    blocking(move || {
        let plane = parts.plane.status(PLANE_WAIT)?;
        let asked = parts.store.servers().and_then(|servers| Ok((servers, parts.store.volumes()?)));
        let store = match asked {
            Ok((servers, volumes)) => StoreView { servers, volumes, error: None },
            Err(error) => StoreView { error: Some(error.to_string()), ..StoreView::default() },
        };
        Ok(Json(types::status_reply(&parts, &plane, store)))
    })
    .await
}

/// Whether the server can do its work.
#[utoipa::path(
    get,
    path = "/v1/health",
    responses((status = 200, body = HealthReply), (status = 503, body = HealthReply))
)]
async fn health(State(parts): State<Arc<Parts>>) -> Response {
    let checked = blocking(move || {
        let mut problems = Vec::new();
        let mut state = HealthState::Ok;
        if let Err(error) = parts.store.revision() {
            // Volumes go on without the store.
            state = HealthState::Degraded;
            problems.push(error.to_string());
        }
        match parts.plane.status(PLANE_WAIT) {
            Ok(status) => {
                if let Some(reason) = status.pool.and_then(|pool| pool.failed) {
                    state = HealthState::Failed;
                    problems.push(format!("the pool has failed: {reason}"));
                }
            }
            Err(error) => {
                state = HealthState::Failed;
                problems.push(error.to_string());
            }
        }
        Ok(HealthReply { state, problems })
    });
    match checked.await {
        Ok(reply) => {
            let status = match reply.state {
                HealthState::Ok | HealthState::Degraded => StatusCode::OK,
                HealthState::Failed => StatusCode::SERVICE_UNAVAILABLE,
            };
            (status, Json(reply)).into_response()
        }
        Err(failure) => failure.into_response(),
    }
}

/// The volumes that are served, or wanted to be.
#[utoipa::path(get, path = "/v1/exports", responses((status = 200, body = Vec<ExportReply>)))]
async fn list_exports(State(parts): State<Arc<Parts>>) -> Result<Json<Vec<ExportReply>>, Failure> {
    blocking(move || {
        let plane = parts.plane.status(PLANE_WAIT)?;
        let views = parts.exports.list();
        Ok(Json(views.iter().map(|view| types::export_reply(view, &plane)).collect()))
    })
    .await
}

/// Serves a volume at a vhost-user socket until it is removed, over restarts of the daemon too.
#[utoipa::path(
    post,
    path = "/v1/exports",
    request_body = ExportRequest,
    responses(
        (status = 201, body = ExportReply, description = "it is served; `state` says if its head is still opening"),
        (status = 400, body = ErrorReply),
        (status = 404, body = ErrorReply, description = "no such volume"),
        (status = 409, body = ErrorReply, description = "held elsewhere, not ready, or the socket is taken"),
        (status = 503, body = ErrorReply, description = "the cluster store is away"),
    )
)]
async fn add_export(
    State(parts): State<Arc<Parts>>,
    request: Result<Json<ExportRequest>, JsonRejection>,
) -> Result<(StatusCode, Json<ExportReply>), Failure> {
    let bad = |text: String| Failure::new(StatusCode::BAD_REQUEST, "bad_request", text);
    let Json(request) = request.map_err(|error| bad(error.body_text()))?;
    let queues = request.queues.unwrap_or(QUEUES_DEFAULT);
    if !(1..=QUEUES_MAX).contains(&queues) {
        return Err(bad(format!("queues must be 1 to {QUEUES_MAX}")));
    }
    let wait_ms = request.wait_ms.unwrap_or(5_000);
    if wait_ms > OPEN_WAIT_MAX_MS {
        return Err(bad(format!("wait_ms must be at most {OPEN_WAIT_MAX_MS}")));
    }
    let wanted = ExportConfig {
        volume: request.volume,
        socket: PathBuf::from(request.socket),
        queues,
        read_only: request.read_only,
        standby: request.standby,
    };
    blocking(move || {
        crate::socket::check_path(&wanted.socket).map_err(bad)?;
        let socket = wanted.socket.clone();
        let volume = parts.exports.add(wanted)?;
        match parts.exports.wait_open(volume, Duration::from_millis(wait_ms)) {
            // A standby has no head to wait for.
            Ok(Some(Opening::Open | Opening::Pending { .. }) | None) => {}
            Err(OpenError::Control(error)) => return Err(error.into()),
            Err(error @ (OpenError::Superseded { .. } | OpenError::Unopenable { .. })) => {
                // The event that comes with it makes it wait; it was asked for just now, so it
                // goes instead.
                let removed = parts.exports.remove(&socket);
                tracing::info!(removed = removed.is_ok(), "the export did not open");
                let text = error.to_string();
                return Err(Failure::new(StatusCode::CONFLICT, "not_opened", text));
            }
        }
        let plane = parts.plane.status(PLANE_WAIT)?;
        let views: Vec<ExportView> = parts.exports.list();
        let view = views.iter().find(|view| view.wanted.socket == socket);
        let gone = || Failure::new(StatusCode::CONFLICT, "removed", "removed in the meantime");
        let reply = types::export_reply(view.ok_or_else(gone)?, &plane);
        Ok((StatusCode::CREATED, Json(reply)))
    })
    .await
}

/// Which export to remove.
#[derive(serde::Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct RemoveQuery {
    /// The export's socket.
    socket: String,
}

/// Stops serving at a socket: drains, disconnects the guest, and gives the volume's lease back
/// after its last export.
#[utoipa::path(
    delete,
    path = "/v1/exports",
    params(RemoveQuery),
    responses((status = 204), (status = 404, body = ErrorReply))
)]
async fn remove_export(
    State(parts): State<Arc<Parts>>,
    query: Result<Query<RemoveQuery>, QueryRejection>,
) -> Result<StatusCode, Failure> {
    let bad = |error: QueryRejection| {
        Failure::new(StatusCode::BAD_REQUEST, "bad_request", error.body_text())
    };
    let Query(query) = query.map_err(bad)?;
    blocking(move || {
        parts.exports.remove(&PathBuf::from(query.socket))?;
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

/// Counters, gauges and latency histograms in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String, content_type = "text/plain")))]
async fn prometheus(State(parts): State<Arc<Parts>>) -> Result<Response, Failure> {
    let text = blocking(move || {
        let mut families = parts.plane.metrics(PLANE_WAIT)?;
        families.extend(parts.own_metrics());
        Ok(metrics::render(&families))
    });
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text.await?).into_response())
}
