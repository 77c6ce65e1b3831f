"""The words that `make_prompts.py` makes prompts of. All our own; nothing was taken from a benchmark's files."""

NOUNS = tuple(
    " ".join(noun.split())
    for noun in """
    abacus, accordion, acorn, alarm clock, almond, ambulance, anchor, antenna, anvil, apron, aquarium, armchair,
    artichoke, avocado, axe, badge, bagel, bagpipe, balloon, banjo, barrel, bathtub, beach ball, beehive,
    beetle, bell, billboard, binder, birdcage, birdhouse, birthday card, blanket, blender, bobsled, bonsai tree,
    bookmark, bookshelf, boomerang, boxing glove, bracelet, brick, briefcase, broom, bucket, bulldozer, burrito,
    butterfly, button, cabin, cactus, calculator, camel, camera, candle, canoe, carousel, castle, caterpillar,
    cauldron, cello, chalkboard, chandelier, cheese wheel, cherry, chess board, chimney, chopstick, clarinet,
    clipboard, clothes iron, coaster, cobweb, coconut, coin, comb, compass, cookie, corkscrew, cowbell, cowboy
    hat, crab, crate, croissant, crowbar, crown, crystal ball, cupcake, curtain, cushion, cymbal, desk lamp,
    diary, dinosaur, dollhouse, dolphin, doorbell, doorknob, dragonfly, drawer, dreamcatcher, drum, duck,
    dumbbell, dustpan, eagle, earring, easel, eggplant, envelope, eraser, escalator, feather, fern, fig, filing
    cabinet, fire extinguisher, fishing rod, flag, flamingo, flashlight, flower pot, flute, fossil, fountain,
    fox, frog, funnel, garlic bulb, gazebo, gear, gift box, globe, glove, goldfish, gong, goose, gorilla,
    gramophone, greenhouse, guinea pig, guitar, hamburger, hammer, hammock, hamster, harmonica, harp, hatchet,
    hedgehog, helicopter, helmet, honey jar, horseshoe, hot air balloon, hourglass, hummingbird, ice cream cone,
    ice skate, igloo, iguana, inkwell, jacket, jar, jellyfish, jewelry box, jukebox, kangaroo, kayak, kettle,
    key, koala, ladder, ladle, ladybug, lantern, lawn mower, leaf, lemon, lighthouse, lizard, lobster, locket,
    log, lollipop, magnet, mailbox, mandolin, mango, mannequin, maraca, marble, mask, matchbox, medal,
    megaphone, metronome, microphone, mirror, mitten, moth, mug, mushroom, napkin, necklace, needle, nest, net,
    notebook, octopus, oil lamp, olive, onion, ostrich, otter, owl, paddle, padlock, pagoda, paintbrush, palm
    tree, pancake, panda, papaya, parachute, parasol, parrot, peach, peacock, peanut, pear, pelican, pencil,
    penguin, piano, pickaxe, picnic basket, pigeon, piggy bank, pillow, pineapple, pinwheel, pitchfork, plum,
    pomegranate, porcupine, postcard, pretzel, propeller, pumpkin, puppet, puzzle piece, rabbit, raccoon, radio,
    radish, raft, rake, ring, robot, rocket, rocking chair, rope, rug, ruler, saddle, sailboat, sandal,
    sandcastle, saxophone, scarecrow, scarf, scorpion, screwdriver, seahorse, seashell, sewing machine, shark,
    shovel, sled, sleeping bag, slipper, snail, snow globe, snowman, soccer cleat, sock, sombrero, spatula,
    spider, spinning top, sponge, squirrel, starfish, statue, stethoscope, stool, stopwatch, strawberry,
    submarine, sunflower, swan, swing, sword, tambourine, tape measure, teapot, telescope, tent, thermometer,
    thimble, tiger, tomato, toolbox, top hat, torch, totem pole, toucan, tractor, treasure chest, tricycle,
    trophy, trowel, trumpet, tuba, tulip, turnip, turtle, typewriter, ukulele, unicycle, urn, vest, violin,
    wallet, walnut, walrus, wand, watering can, watermelon, whale, wheelbarrow, whistle, wig, wind chime,
    windmill, wolf, wrench, xylophone, yacht, zipper
    """.split(",")
)  # everyday things that are no COCO class, hold no colour or texture word, and go to the plural and back
COUNTS = (2, 3, 4, 5, 6)
RELATIONS_2D = ("left of", "right of", "above", "below", "next to")  # that a detector can check
RELATIONS_3D = ("in front of", "behind", "hidden by")
TEXTURES = (
    "wooden", "metal", "glass", "plastic", "leather", "rubber", "stone", "ceramic", "wicker", "velvet", "bronze",
    "cardboard", "woolen", "knitted",
)  # fmt: skip
SHAPES = ("round", "square", "oval", "triangular", "rectangular", "cubic", "conical", "hexagonal")
SIZES = (("big", "small"), ("large", "tiny"), ("tall", "short"), ("giant", "little"), ("huge", "small"))
COMPARISONS = ("larger than", "smaller than", "taller than", "twice as big as", "half as big as")
ABSENCES = ("without", "with no", "and no", "but without")

# Free-form sentences: what is drawn, where, when, in which manner; every part has a meaning of its own for a renderer.
PLACES = (
    "on a rainy street at night", "in an attic full of dust", "on a beach at low tide", "in a sunlit kitchen",
    "at the edge of a pine forest", "on the deck of a ferry", "in a crowded market hall", "beside a frozen lake",
    "in an empty subway station", "on the roof of a tall building", "in a greenhouse after closing time",
    "at the bottom of a swimming pool", "in a field of tall grass", "on a windowsill in winter",
    "in the corner of an old workshop", "under a stone bridge", "in a quiet library", "on a desert road at noon",
)  # fmt: skip
MOMENTS = (
    "at dawn", "in thick fog", "just after the rain", "by candlelight", "under a full moon",
    "in the last light of day", "while snow is falling", "under a stormy sky", "in bright midday sun",
    "lit from below",
)  # fmt: skip
MANNERS = (
    "a watercolor of", "a pencil sketch of", "a low-angle shot of", "a macro photograph of", "an oil painting of",
    "a retro travel poster showing", "a paper-cut illustration of", "a long-exposure photograph of",
    "a pixel-art scene of", "a charcoal study of", "a bird's-eye view of", "a cinematic still of",
)  # fmt: skip
STATES = (
    "lies forgotten", "floats in mid-air", "stands half buried", "casts a long shadow", "is wrapped in string",
    "leans against a wall", "is covered with frost", "hangs from a thread", "is reflected in a puddle",
    "is lit by a single beam",
)  # fmt: skip
DEEDS = (
    "a child reaches for", "an old sailor repairs", "two strangers argue over", "a gardener carries",
    "a street artist paints", "a robot carefully inspects", "someone in a raincoat photographs", "a chef balances",
)  # fmt: skip
