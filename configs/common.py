"""Every field of a run, with unit and source; the other configs change a few lines.

"A5" or "D18" are decisions and differences between the CT paper (Ali, Shaharabany,
Wolf) and its published code, listed in experiments/README.md.

A config file takes words after a colon, `--config=configs/siteB.py:full,lite0`: see
configs/rows.py.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # Seeds weights, shuffling, augmentation and mixing.
    # Bit-equal runs on one device type. CPU and TPU are so anyway; on a GPU it sets
    # XLA's flag, which forgoes autotuning and the fastest scatters and convolutions.
    # Never equal across device types, numbers of devices, or versions of jaxlib.
    config.deterministic = False
    config.method = "guided"  # Key of cxai_jax.methods.METHODS: the train step.

    config.model = model = ConfigDict()
    model.name = "resnet50"  # Key of cxai_jax.models.MODELS.
    # linear | mlp, whose class map is Grad-CAM (A11) | flat: linear as well, but with
    # weights for every cell instead of the pool of all, as LeNet has.
    model.head = "linear"
    model.extra_bn = False  # BN+ReLU after layer2 and layer4, as published (A10).
    # "", lite0-imagenet (lite1, lite2), a file (.npz .safetensors .pth), hub id.
    model.pretrained = ""
    model.dtype = "float32"  # Convolutions: float32 | bfloat16. Losses stay float32.
    model.norm = "plain"  # plain | per_site: scale, bias, statistics of each site.
    # none | series | parallel: a 1x1 convolution of each site at every 3x3 of a ResNet.
    model.adapter = "none"
    # COVID-Net alone. published: the fourth stage gets the sum of the published code,
    # with P_32 twice and without P_33 | all: every term once.
    model.stage4_input = "published"
    model.projection = 0  # Width of the embedding that `contrastive` compares; 0: none.
    # Channels of a calibrator before the network, which method calibrator trains; 8 as
    # published, 0: none.
    model.calibrator = 0
    model.remat = False  # Recompute each block in the backward pass to save memory.

    config.data = data = ConfigDict()
    data.name = "phantom"  # Key of cxai_jax.data.DATASETS.
    data.data_dir = "data"  # Where cxai-prepare wrote its array_records.
    data.split = ""  # Split scheme; "" is the data set's honest default.
    # "2of5": fold 2 of 5 of all images is `test`, of the rest an eighth `val`, patients
    # kept whole (site A: blocks of file numbers); "": the split as prepared.
    data.fold = ""
    data.split_seed = 0  # Seed of the folds.
    data.positive = ""  # tfds only: class whose sensitivity is reported, if not clear.
    data.fit = "train"  # Splits trained on: train | train+val.
    data.target = ""  # Splits of unlabelled images, for methods that take them.
    data.other = ""  # Splits of a third domain, unlabelled too (dranet).
    data.test = "test"  # Split scored at the end; of another data set: usps:test.
    data.image_size = 224  # Pixels, side of the network's input.
    data.resize = 256  # Pixels, short side before the random crop (D18).
    # model: the constants of the backbone's weights; per_image: zero mean and unit
    # variance of every image by itself, as Appendix A says (A19).
    data.normalisation = "model"
    data.site_repeats = (1,)  # How often each site enters an epoch, e.g. (1, 4) (A21).
    data.residency = "auto"  # device | host | auto: where the uint8 images live.
    data.phantom_images = 480  # Phantom only: images over both sites and all splits.
    # Phantom only: probability that the burnt-in letter agrees with the label in train
    # and val, e.g. "0.95"; "" is 0.5, no relation, which test always has.
    data.phantom_mark = ""

    data.digits_images = 0  # Digits only: first training images that count; 0: all.
    # mnist_m only: folder of photographs that it is made over where it is missing, such
    # as BSDS500's; "" takes those of scikit-image (extra `photographs`).
    data.photographs = ""

    config.augment = augment = ConfigDict()
    # random: short side to `resize`, random crop (published, D18); square: squash to
    # `resize`, random crop (the aspect that scoring sees); none: squash, no crop.
    augment.crop = "random"
    augment.hflip = True  # Horizontal flip with probability one half (D18).
    augment.vflip = True  # Vertical flip with probability one half (D18).
    augment.rotate = 0.0  # Degrees: each image turns by up to so much, either way.
    # Strength of the jitter of gamma, contrast and brightness, e.g. 0.2; see
    # data.augment.random_intensity; 0 is off.
    augment.intensity = 0.0

    config.mix = mix = ConfigDict()
    mix.name = "snapmix"  # none | snapmix | cutmix | as_cutmix | mixup | cutout.
    mix.prob = 1.0  # Probability that a batch is mixed (A9).
    mix.beta = 1.0  # Both parameters of the Beta distribution of lambda (A8).
    mix.same_class = "double"  # double (published) | interp (the formula) (A6).
    mix.boxes = "batch"  # One pair of boxes per batch (published) | per sample (A7).
    # Partners come from 1/groups of the batch; 0: one group per device, so no image
    # moves, unless that leaves fewer than 8 images in each: then of several devices.
    mix.groups = 0

    config.loss = loss = ConfigDict()
    # What cross-entropy takes: logits | sigmoid, of which Wang et al. (2020b) take the
    # softmax, so that it cannot fall below 0.313.
    loss.scores = "logits"

    config.cam = cam = ConfigDict()
    cam.mode = "train"  # Norm in the clean pass: train (published) | eval (A5).

    config.cpe = cpe = ConfigDict()
    cpe.weight = 1.0  # Weight of the contrastive patch embedding; 0 is off (A3).
    cpe.num_patches = 2  # n, cells per group (Fig. 3c).
    # True divides every patch by its L2 norm. Eq. 1 takes raw dot products (False);
    # on pretrained features they dominate at once: on the first batches of site B their
    # loss is 192 times and their gradient 1,700 times the cross-entropy's, normalised
    # ones 3.9 and 0.84 times (experiments/results/cpe_scale.json, A2).
    cpe.normalize = True
    cpe.temperature = 1.0  # Divides the similarities.
    cpe.sqrt_d = False  # True divides them by sqrt(D) as well, as attention does.
    cpe.ramp = 0.0  # Share of all steps over which the weight grows from 0.
    cpe.negatives = "all4"  # all4 (Eq. 1) | anchor2 (published code) (A1).
    cpe.cam_source = "mixed"  # mixed: rank the mixed image | clean: as published (A4).

    config.contrastive = contrastive = ConfigDict()
    # Weight of the supervised NT-Xent between the images of a batch, the row SnapMix +
    # Contrastive; needs model.projection; 0 is off (A16).
    contrastive.weight = 0.0
    contrastive.temperature = 0.05  # Divides the cosines.

    config.align = align = ConfigDict()
    align.weight = 0.0  # Weight of the saliency alignment loss; 0 is off.
    align.maps = ("cam", "gradcam_lower")  # + "input_gradient" is profile full.
    align.distance = "js"  # js | symkl | cosine | mse | tv | pearson.
    align.rectify = "mean"  # mean | zero (literal Grad-CAM, collapses).
    align.target = "centred"  # centred | logit.
    align.alpha_grad = "full"  # full | stop: gradient through Grad-CAM's weights.
    align.form = "gradcam"  # gradcam | hires.
    align.eta = 0.05  # Share of the uniform map mixed in before the logarithm.
    align.ramp = 0.3  # Share of all steps over which the weight grows from 0.
    align.input_grad_fraction = 1.0  # Share of the batch used by the input gradient.
    align.mask_weight = 0.0  # Weight of 1 - energy in the lung mask.
    align.mask_dilate = 1  # Cells of the class map by which that mask grows.

    config.adapt = adapt = ConfigDict()
    adapt.weight = 1.0  # Of the adversary; dann's factor of lambda.
    adapt.hidden = (100,)  # Hidden layers of the domain classifier (Ganin et al.).
    # Share of all steps before the second part of a method begins: cycada's adversary,
    # the calibrator.
    adapt.features_after = 0.5
    adapt.lr = 2e-4  # Adam's rate for generators and discriminators (Zhu et al.).
    adapt.calibrator_lr = 1e-4  # Adam's rate for calibrator and judges (Ye et al.).
    adapt.width = 64  # Channels of their first layers.
    adapt.blocks = 9  # Residual blocks of a ResNet generator.
    adapt.pool = 100  # Generated images kept per discriminator; at least a batch.
    adapt.cycle_weight = 1.0  # CycleGAN's cycles, as CyCADA weighs them for digits.
    adapt.content_weight = 1.0  # dranet: of relu4_2, for ImageNet's perceptual weights.
    adapt.style_weight = 5e3  # dranet: of Gram matrices; 5e4 and 1e4 with MNIST-M.
    adapt.generator_steps = 2  # dranet: steps of E, S and G for one of D.
    # dranet: weights of VGG-19 in torchvision's names (.pth .npz); "": random ones.
    adapt.perceptual = ""
    adapt.perceptual_width = 64  # Channels of its first block.

    config.optim = optim = ConfigDict()
    # sgd | adam (coupled decay) | adamw (decoupled), as torch.optim has them.
    optim.name = "sgd"
    optim.lr_trunk = 0.001  # Learning rate of pretrained parameters (A20).
    optim.lr_fresh = 0.01  # Learning rate of all others; everything if no weights.
    # Rules EXPRESSION=GROUP, e.g. ("head/.*=fresh", "stage4/.*=0.003:cosine",
    # ".*=frozen"): the first expression that matches a parameter's whole name decides.
    # Groups: trunk and fresh (the rates above), frozen, RATE or RATE:SCHEDULE. ():
    # pretrained parameters are trunk, all others fresh.
    optim.groups = ()
    optim.momentum = 0.9  # Of Nesterov; beta 1 of adam and adamw.
    optim.weight_decay = 1e-4  # L2 on all parameters, norms included; see name.
    # multistep | cosine | constant | inverse: (1 + 10 p)^-0.75 at share p of the
    # steps (Ganin et al.).
    optim.schedule = "multistep"
    optim.milestones = (0.4, 0.75, 0.9)  # Shares of all steps: 80, 150, 180 of 200.
    optim.gamma = 0.1  # Factor at each milestone.
    optim.warmup = 0.0  # Share of all steps with a linear warm-up.
    optim.clip_norm = 0.0  # Global gradient norm; 0 is off.

    config.ms_net = ms_net = ConfigDict()
    # Method ms_net: share of all steps before its universal head learns (published: 500
    # of 50,000 steps).
    ms_net.warmup = 0.01
    ms_net.distill = 0.5  # Weight of the site heads' answers; the rest is the labels'.

    config.train = train = ConfigDict()
    train.batch_size = 64  # Images per step over all devices and hosts.
    train.epochs = 200.0  # Passes over the (repeated) training images.
    train.accumulate = 1  # Micro-batches per optimiser step.
    train.steps_per_call = 1  # Steps in one dispatch (lax.scan), device residency only.
    train.log_every_steps = 20  # Host reads the metrics this often, never in between.
    train.eval_every_epochs = 0.0  # Scores validation and test; 0: only at the end.
    train.checkpoint_every_epochs = 5.0  # 0: only at the end.
    train.checkpoint_every_minutes = 10.0  # As well, for machines that are taken away.
    # A loss or weight that is not finite: stop, naming the images | skip the step,
    # count it as `skipped` and go on with the state before it.
    train.on_nan = "stop"
    train.keep_checkpoints = 2  # Latest ones kept, beside the best.
    train.selection = "last"  # last | best_val (A22). Never the test split.
    # What best_val and patience compare, on validation: accuracy | auc | macro_f1 |
    # balanced_accuracy | auprc.
    train.select_metric = "accuracy"
    # Stops after so many evaluations without a better select_metric; 0 is off.
    train.patience = 0
    # Cross-entropy by true class: none | auto, inverse to its share of the training
    # images | "1,3", a weight for each. The mean over the training images is 1.
    train.class_weights = "none"
    train.label_smoothing = 0.0  # Share of each label spread over all classes.
    # Decay by step of the average of weights and running statistics that is scored
    # instead of the last ones, e.g. 0.999; 0 is off.
    train.ema = 0.0

    config.eval = evaluation = ConfigDict()
    evaluation.batch_size = 32  # Images per forward pass over all devices.
    evaluation.bootstrap = 2000  # Resamples behind each 95 % interval.

    config.tta = tta = ConfigDict()
    tta.k = 0  # Masks per image; the paper's value is 31, 0 is off.
    tta.theta = 0.2  # Support threshold.
    tta.patch = 8  # Pixels, side of a masked cell.
    tta.fill = "min"  # min | zero | mean, of the normalised image (A14).
    tta.chunk = 64  # Images (variants counted) per forward pass: bounds memory.
    tta.early_exit = True  # predict stops an image once its label cannot change.
    # Run a ResNet's stem and layer1 on the changed part of each masked image only, with
    # the same result: auto (on a CPU, where it is bitwise the same and measured to
    # gain) | on (an error where impossible) | off.
    tta.prefix_reuse = "auto"
    return config
