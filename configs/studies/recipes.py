"""Ablation of recipes: one cycle plus one change, or several, in the same net.

python -m analysis.study configs/studies/recipes.py:small --workdir=/tmp/recipes-small
python -m analysis.study configs/studies/recipes.py --workdir=/tmp/recipes

The small form is for images of 16x16 pixels, which --config.data.name gives
(docs/recipes.md).
"""

from ml_collections import ConfigDict


def get_config(form: str = "full"):
    if form not in ("small", "full"):
        raise ValueError(f"unknown form {form!r}: choose from small, full")
    small = form == "small"
    epochs = 15.0 if small else 100.0
    cosine = dict(schedule="cosine", warmup_epochs=epochs / 20)

    def combine(**optimizer):
        return dict(
            optimizer=dict(weight_decay=5e-4, decay_on="kernels", **optimizer),
            train=dict(label_smoothing=0.1),
        )

    study = dict(
        claim="A recipe of our own beats the original's in a third of its epochs.",
        backbones=dict(
            xdensenet=dict(
                config="configs/xdensenet.py:40-24-2,cifar10",
                width=dict(growth=1),
                widths=(24,),
            ),
        ),
        wirings=dict(
            one_cycle=dict(),
            steps=dict(
                optimizer=dict(
                    schedule="steps", drop_epochs=(epochs / 2, 0.75 * epochs)
                )
            ),
            cosine=dict(optimizer=cosine),
            rate_0_05=dict(optimizer=dict(learning_rate=0.05)),
            rate_0_2=dict(optimizer=dict(learning_rate=0.2)),
            decay_2e_4=dict(optimizer=dict(weight_decay=2e-4)),
            decay_5e_4=dict(optimizer=dict(weight_decay=5e-4)),
            decay_5e_4_rate_0_2=dict(
                optimizer=dict(weight_decay=5e-4, learning_rate=0.2)
            ),
            decay_on_kernels=dict(optimizer=dict(decay_on="kernels")),
            heavy_ball=dict(optimizer=dict(nesterov=False)),
            label_smoothing=dict(train=dict(label_smoothing=0.1)),
            ema=dict(train=dict(ema=0.99 if small else 0.9995)),
            cutout=dict(augment=dict(cutout=4 if small else 8)),
            randaugment=dict(
                augment=dict(randaugment_ops=1, randaugment_magnitude=5.0)
            ),
            mixup=dict(augment=dict(mixup=0.2)),
            adamw=dict(
                optimizer=dict(name="adamw", learning_rate=2e-3, weight_decay=0.05)
            ),
            combined=combine(),
            combined_cosine=combine(**cosine),
            combined_cosine_rate_0_2=combine(**cosine, learning_rate=0.2),
        ),
        reference="one_cycle",
        equal="width",
        seeds=3,
        changes=dict(
            train=dict(epochs=epochs),
            optimizer=dict(
                schedule="one_cycle",
                min_learning_rate=0.0,
                nesterov=True,
                rate_in_velocity=False,
            ),
            eval=dict(every_epochs=epochs),
        ),
        columns=("seeds", "final", "final_difference"),
    )
    if small:
        study["backbones"] = dict(
            resnet=dict(
                config="configs/cfmz.py:20,cifar10",
                width=dict(),  # of a single size
                widths=(1,),
            ),
        )
        study["changes"]["train"]["batch_size"] = 64
    return ConfigDict(study)
