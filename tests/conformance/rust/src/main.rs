//! Trains with nothing but generated stubs, and prints every event. Arguments: TARGET MODEL DATASET.
#[allow(dead_code)]
mod google {
    pub mod rpc {
        tonic::include_proto!("google.rpc");
    }
}
#[allow(dead_code)] // the rules of the contract, which only the server checks
mod buf {
    pub mod validate {
        tonic::include_proto!("buf.validate");
    }
}
#[allow(dead_code)]
mod unslothd {
    pub mod v1 {
        tonic::include_proto!("unslothd.v1");
    }
}

use unslothd::v1::dataset_source::Origin;
use unslothd::v1::load_model_response::Result::Model;
use unslothd::v1::unsloth_service_client::UnslothServiceClient;
use unslothd::v1::{DatasetSource, LoadModelRequest, PrepareForTrainingRequest, TrainRequest, UnloadModelRequest};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let [target, model_name, dataset] = <[String; 3]>::try_from(std::env::args().skip(1).collect::<Vec<_>>())
        .map_err(|_| "arguments: TARGET MODEL DATASET")?;
    let mut server = UnslothServiceClient::connect(format!("http://{target}")).await?;

    let mut load = server
        .load_model(LoadModelRequest {
            model_name,
            ..Default::default()
        })
        .await?
        .into_inner();
    let mut model_id = String::new();
    while let Some(message) = load.message().await? {
        if let Some(Model(model)) = message.result {
            model_id = model.model_id;
        }
    }
    let request = PrepareForTrainingRequest {
        model_id: model_id.clone(),
        ..Default::default()
    };
    server.prepare_for_training(request).await?;

    let rows = DatasetSource {
        origin: Some(Origin::Path(dataset)),
        ..Default::default()
    };
    let request = TrainRequest {
        model_id: model_id.clone(),
        train_dataset: Some(rows),
        ..Default::default()
    };
    let mut events = server.train(request).await?.into_inner();
    while let Some(message) = events.message().await? {
        let event = message.event.ok_or("an empty response")?;
        println!(
            "{} {}",
            event.sequence,
            event.kind.map_or("unknown".into(), |kind| format!("{kind:?}"))
        );
    }
    server
        .unload_model(UnloadModelRequest { model_id, force: false })
        .await?;
    Ok(())
}
