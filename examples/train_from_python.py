"""The job of the demo from a script or a notebook, on a server that runs already.

unslothd serve --home .demo/home --output-root .demo/output --model-root .demo/models   # in another terminal
python examples/train_from_python.py
"""

import sys

import trivia

import unslothd

target = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
train_rows, eval_rows = trivia.rows()  # lists of {"messages": […]}; a datasets.Dataset or a DataFrame does as well

with unslothd.Client(target) as client:
    model = client.load_model("SmolLM2-135M-Instruct.Q4_1.gguf", max_seq_length=256)
    try:
        client.prepare(model, learning_rate=2e-4, batch_size=8, gradient_accumulation_steps=1, lora={"r": 16})
        run = client.train(model, train_rows, eval_rows, max_steps=10, warmup_steps=2)
        for event in run:
            if event.HasField("step"):
                print(f"step {event.step.step:3}  loss {event.step.loss:.3f}")
            elif event.HasField("evaluation"):
                print(f"eval loss {event.evaluation.eval_loss:.3f}")
        print("adapter:", client.get_training(run).output_dir)

        question = [{"role": "user", "content": trivia.QUESTIONS[0]}]
        print(trivia.QUESTIONS[0], "→", client.generate(model, question, max_new_tokens=32).text())
    finally:
        client.unload_model(model, force=True)
