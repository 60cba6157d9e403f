"""Training, evaluation and generation on byte-level text. Stands after the runtime, beside ``tasks``.

    config      TrainConfig, learning_rate (imports no torch)
    loop        train
    checkpoint  save_checkpoint, newest, find; atomic and folder below it
    evaluate    bits_per_byte
    generate    generate
    demo        a small comparison, end to end

accelerate is imported by ``train`` only, matplotlib by ``figures`` only.
"""
