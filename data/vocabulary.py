"""The words that `make_prompts.py` makes prompts of. All our own; nothing was taken from a benchmark's files.

Objects are everyday things that are neither classes of COCO (GenEval's objects) nor on T2I-CompBench's list, hold no
word for a colour, texture or shape, and go to the plural and back. No object's name ends in another's.
"""


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


ANIMALS = _names(
    """
    beetle, caterpillar, crab, dinosaur, dolphin, dragonfly, eagle, flamingo, fox, goose, gorilla, guinea pig,
    hamster, hedgehog, hummingbird, iguana, jellyfish, kangaroo, koala, ladybug, lizard, lobster, moth, octopus,
    ostrich, otter, owl, panda, parrot, peacock, pelican, penguin, pigeon, porcupine, raccoon, scorpion,
    seahorse, shark, snail, spider, squirrel, starfish, tiger, toucan, walrus, whale, wolf
    """
)
LARGE = _names(  # stand in a landscape
    """
    ambulance, billboard, bobsled, bulldozer, cabin, carousel, castle, escalator, fountain, gazebo, greenhouse,
    hot air balloon, igloo, lighthouse, pagoda, palm tree, raft, rocket, sailboat, sandcastle, scarecrow,
    statue, submarine, swing, totem pole, tractor, windmill, yacht
    """
)
THINGS = _names(  # stand on a floor or a shelf
    """
    abacus, accordion, acorn, alarm clock, almond, anchor, antenna, anvil, apron, aquarium, armchair, artichoke,
    avocado, axe, badge, bagel, bagpipe, banjo, barrel, bathtub, beach ball, beehive, bell, binder, birdcage,
    birdhouse, birthday card, blanket, blender, bonsai tree, bookmark, bookshelf, boomerang, boxing glove,
    bracelet, brick, briefcase, broom, bucket, burrito, button, cactus, calculator, canoe, cauldron, cello,
    chalkboard, chandelier, cheese wheel, cherry, chess board, chimney, chopstick, clarinet, clipboard, clothes
    iron, coaster, cobweb, coconut, coin, comb, compass, cookie, corkscrew, cowbell, cowboy hat, crate,
    croissant, crowbar, crown, crystal ball, cupcake, curtain, cushion, cymbal, desk lamp, diary, dollhouse,
    doorbell, doorknob, drawer, dreamcatcher, dumbbell, dustpan, earring, easel, eggplant, envelope, eraser,
    feather, fern, fig, filing cabinet, fire extinguisher, fishing rod, flashlight, flower pot, flute, fossil,
    funnel, garlic bulb, gear, gift box, gong, gramophone, hammer, hammock, harmonica, harp, hatchet, honey jar,
    horseshoe, hourglass, ice cream cone, ice skate, inkwell, jacket, jewelry box, jukebox, kayak, kettle,
    ladder, ladle, lantern, lawn mower, leaf, locket, log, lollipop, magnet, mailbox, mandolin, mango,
    mannequin, maraca, marble, mask, matchbox, medal, megaphone, metronome, mirror, mitten, mug, mushroom,
    napkin, necklace, needle, nest, net, notebook, oil lamp, olive, onion, padlock, paintbrush, pancake, papaya,
    parachute, parasol, peanut, pencil, piano, pickaxe, picnic basket, piggy bank, pineapple, pinwheel,
    pitchfork, plum, pomegranate, postcard, pretzel, propeller, pumpkin, puppet, puzzle piece, radio, radish,
    rake, ring, robot, rocking chair, rope, rug, ruler, saddle, sandal, saxophone, scarf, screwdriver, seashell,
    sewing machine, shovel, sled, sleeping bag, slipper, snow globe, snowman, soccer cleat, sock, sombrero,
    spatula, spinning top, sponge, stethoscope, stopwatch, sunflower, sword, tambourine, tape measure, teapot,
    telescope, thermometer, thimble, toolbox, top hat, torch, treasure chest, tricycle, trophy, trowel, trumpet,
    tuba, tulip, turnip, typewriter, ukulele, unicycle, urn, vest, violin, wallet, walnut, wand, watering can,
    watermelon, wheelbarrow, whistle, wig, wind chime, wrench, xylophone, zipper
    """
)
NOUNS = (*ANIMALS, *LARGE, *THINGS)

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

# What carries words, and the words.
SURFACES = (
    "wooden sign", "label", "book cover", "neon sign", "T-shirt", "chalkboard", "storefront", "movie poster",
    "birthday card", "coffee mug", "road sign", "newspaper", "billboard", "paper bag", "license plate",
    "birthday cake", "postage stamp", "banner", "gravestone", "magazine cover",
)  # fmt: skip
SAID = ("that says", "reading", "with the words", "on which one reads")
WORDS = (
    "open", "closed", "welcome", "exit", "danger", "silence", "fragile", "tickets", "bakery", "museum", "library",
    "pharmacy", "caution", "sold out", "no parking", "keep left", "wet paint", "staff only", "happy birthday",
    "good night", "thank you", "stay curious", "be kind", "mind the gap", "do not disturb", "open all night",
    "out of order", "fresh every day", "the last train", "room for one more", "once upon a time", "made by hand",
)  # fmt: skip
CASES = (str.upper, str.capitalize, str.title)

# Scenes, worded so that a relation takes hold of its own two things only.
SCENES = (
    "{one} {relation} {other}, and {many}",
    "{many}, and {one} that is {relation} {other}",
    "{one} {relation} {other}, with {many} around them",
    "a scene with {many}, and with {one} {relation} {other}",
    "{one} is {relation} {other}, and there are {many} as well",
)

# Free-form sentences. {it}, {colored} and {them} are what the sentence is about, {animal} and {thing} come along;
# the others are keys of PARTS. No two parts of a form speak of the light, or of the time of day.
FORMS = {
    ANIMALS: (
        "{it} {does} {wild} {when}",
        "{it} {does} {wild}, {how}",
        "{colored} {does} while {who} looks on, {how}",
        "{them} {do} {wild} {when}",
        "{them} {do} around {thing}, {how}",
        "{it} and {animal} meet {wild} {when}",
        "{who} follows {it} {wild}, {how}",
        "{who} reads a letter aloud to {it} {wild}",
        "a portrait of {it} dressed as {who}, {how}",
        "{it} proudly guards {thing} {wild} {when}",
        "{it} sniffs at {thing} {wild}, {how}",
        "close-up of {it} that has just found {thing}, {how}",
        "please draw {it} that {does} {wild} {when}",
        "{when} {colored} crosses a swaying footbridge, {how}",
        "a bedtime story: {it} {does} {wild}, and {who} brings it {thing}",
        "seen through a keyhole, {it} {does} {wild}",
    ),
    LARGE: (
        "{it} stands alone {land} {when}",
        "{it} slowly disappears into the mist {land}, {how}",
        "{who} looks up at {it} {land} {when}",
        "{it} overgrown with ivy {land}, {how}",
        "aerial view of {colored} {land} {when}",
        "people gather around {it} {land} to watch the fireworks",
        "{it} built entirely of ice {land}, {how}",
        "{them} are scattered {land} {when}",
        "{animal} has made its home in {it} {land}, {how}",
        "imagine {it} {land}: nobody has come here for years, {how}",
        "{who} paints {colored} {land} while {animal} {does}",
        "{it} is reflected in the window of a spaceship {land}",
        "could you design a poster that shows {it} {land} {when}?",
    ),
    THINGS: (
        "{it} lies forgotten {spot} {when}",
        "{it} stands {spot}, {how}",
        "{who} holds {it} up and laughs, {how}",
        "{who} carefully wraps {it} in paper {spot}",
        "{who} is selling {them} {spot} {when}",
        "{them} are lined up {spot} while {who} dusts them",
        "rain drips onto {colored} {spot}, {how}",
        "a still life of {it}, {thing} and a spilled jug of milk, {how}",
        "{it} as tall as a tower rises {land}, {how}",
        "an entire city has been built inside {it} {spot}",
        "{animal} plays with {it} {spot} {when}",
        "an advertisement for {colored}, bold and simple, {how}",
        "{it} melts like wax {spot}, {how}",
        "{who} bargains over {it} at a flea market {when}",
        "can you show {it} floating weightlessly through a space station, {how}?",
        "{it} in a museum, roped off, while the guard has fallen asleep",
        "the tide washes {colored} ashore {when} and {who} picks it up",
        "an explorer stumbles upon {it} {land} {when}",
        "macro shot of {it} covered in dew {when}",
    ),
}
_DOING = (
    ("is fast asleep", "are fast asleep"), ("turns toward the viewer", "turn toward the viewer"),
    ("stretches and yawns", "stretch and yawn"), ("leaps over a puddle", "leap over a puddle"),
    ("walks away from us", "walk away from us"), ("hides from the wind", "hide from the wind"),
    ("listens to distant music", "listen to distant music"), ("peers into the dark", "peer into the dark"),
    ("dances with closed eyes", "dance with closed eyes"), ("shivers with cold", "shiver with cold"),
    ("waits for a letter", "wait for a letter"), ("gazes at the clouds", "gaze at the clouds"),
)  # fmt: skip
PARTS = {
    "does": tuple(one for one, _ in _DOING),
    "do": tuple(many for _, many in _DOING),
    "who": (
        "an old sailor", "a baker", "an astronaut", "a ballerina", "a beekeeper", "a blacksmith", "a clown",
        "a detective", "a diver", "a farmer", "a fisherman", "a gardener", "a grandmother", "a knight", "a librarian",
        "a lifeguard", "a magician", "a monk", "a nurse", "a painter", "a pilot", "a pirate", "a scientist",
        "a tailor", "a wizard", "a child in a raincoat",
    ),
    "wild": (
        "on mossy rocks", "deep in a pine forest", "at the edge of a quiet lake", "on a flat rooftop",
        "in a field of tall grass", "under a stone bridge", "on a windy cliff", "in a narrow alley",
        "beside a mountain stream", "on a sandy dune", "on the deck of a ferry", "in an empty theater",
        "in a crowded market hall", "in a flooded street", "among ancient ruins", "in an abandoned subway station",
    ),
    "spot": (
        "on a windowsill", "in an attic full of dust", "on a cluttered workshop floor", "on a worn doorstep",
        "in a shop window", "on a kitchen counter", "on a heap of old letters", "in a puddle", "on a stone staircase",
        "in a hotel lobby", "among fallen petals", "in the corner of an empty room", "on a garden wall",
        "in an open trunk", "on the steps of a theater", "in a quiet library",
    ),
    "land": (
        "on a hill above the sea", "in the middle of a desert", "at the edge of a forest", "in a deep valley",
        "by a calm lake", "in a small harbor", "on a distant planet", "in a wide meadow", "at the foot of a volcano",
        "in an abandoned village", "on a sandbank", "above a sea of clouds", "in the heart of a busy city",
        "on a rocky island",
    ),
    "when": (
        "at dawn", "at dusk", "at midnight", "at noon", "on a rainy afternoon", "on a foggy morning",
        "during the first snow", "after a thunderstorm", "under a full moon", "at sunset", "in late autumn",
        "on a hot summer day", "just before the storm", "by candlelight",
    ),
    "how": (
        "in watercolor", "as a quick sketch", "as a woodblock print", "in pixel art", "as a thick oil painting",
        "as a stained-glass window", "as a vintage postage stamp", "as a charcoal drawing", "cut from paper",
        "as a claymation still", "as a comic panel", "in the manner of a renaissance master",
        "as an isometric drawing", "in a few strokes of ink", "as a faded snapshot", "like a film still",
        "as embroidery", "as low-poly art",
    ),
}  # fmt: skip
