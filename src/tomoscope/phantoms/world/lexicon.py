"""The words that the micro-world is made of, beyond those of the library's tasks.

Geography is true (capitals, what country a city lies in, one official language a country); people and companies are
invented. A topic is a set of words that stand together in a story, so that a feature for a topic has a ground truth.
How they can mislead: a country with several official languages has one here, and a topic's words are ours.
"""

from __future__ import annotations

from tomoscope.data.tasks.words import SURNAMES as TASK_SURNAMES


def words(text: str) -> tuple[str, ...]:
    """The words of a text, in order."""
    return tuple(text.split())


COUNTRIES: tuple[tuple[str, ...], ...] = tuple(
    tuple(line.split())
    for line in """
France French Paris Lyon Marseille
Germany German Berlin Hamburg Munich
Italy Italian Rome Milan Naples
Spain Spanish Madrid Barcelona Seville
England English London Liverpool Manchester
Russia Russian Moscow Kazan Samara
Japan Japanese Tokyo Osaka Kyoto
China Chinese Beijing Shanghai Wuhan
Egypt Arabic Cairo Alexandria Luxor
Greece Greek Athens Patras Corinth
Ireland Irish Dublin Cork Galway
Austria Austrian Vienna Graz Salzburg
Poland Polish Warsaw Krakow Gdansk
Turkey Turkish Ankara Istanbul Izmir
Iraq Kurdish Baghdad Basra Mosul
Iran Persian Tehran Shiraz Isfahan
Syria Aramaic Damascus Aleppo Homs
Cuba Cuban Havana Holguin Camaguey
Norway Norwegian Oslo Bergen Stavanger
Sweden Swedish Stockholm Malmo Uppsala
Denmark Danish Copenhagen Aarhus Odense
Belgium Flemish Brussels Antwerp Ghent
Portugal Portuguese Lisbon Porto Braga
Hungary Hungarian Budapest Szeged Pecs
Canada Canadian Ottawa Toronto Montreal
Kenya Swahili Nairobi Mombasa Kisumu
Ukraine Ukrainian Kiev Lviv Odessa
Afghanistan Pashto Kabul Herat Kandahar
Finland Finnish Helsinki Tampere Turku
Romania Romanian Bucharest Cluj Brasov
Bulgaria Bulgarian Sofia Varna Plovdiv
Croatia Croatian Zagreb Split Zadar
Serbia Serbian Belgrade Nis Subotica
Israel Hebrew Jerusalem Haifa Eilat
India Hindi Delhi Mumbai Chennai
Thailand Thai Bangkok Phuket Pattaya
Vietnam Vietnamese Hanoi Saigon Hue
Mongolia Mongolian Ulaanbaatar Darkhan Erdenet
Nepal Nepali Kathmandu Pokhara Lalitpur
Ethiopia Amharic Addis Gondar Harar
Georgia Georgian Tbilisi Batumi Kutaisi
Armenia Armenian Yerevan Gyumri Vanadzor
Iceland Icelandic Reykjavik Akureyri Selfoss
Estonia Estonian Tallinn Tartu Narva
""".strip().splitlines()
)
"""(country, language, capital, second city, third city)."""

MORE_SURNAMES: tuple[str, ...] = words("""
Adams Allen Anders Archer Barnes Barrett Bennett Bishop Blake Boyd Bradley Bryant Burke Burns Butler Campbell Chapman
Coleman Cross Curtis Dalton Dawson Dixon Doyle Duncan Elliott Ellis Ferguson Fisher Fleming Fletcher Foster Fowler
Gibson Gordon Graham Grant Griffin Hamilton Harper Harrison Hayes Holmes Howard Hudson Hughes Hunter Jenkins Jordan
Keller Kennedy Knight Lambert Lawson Lloyd Logan Marshall Mason Mercer Mills Mitchell Morris Myers Newman Nolan Norton
Owens Palmer Payne Perkins Porter Powell Quinn Ramsey Reeves Reynolds Rhodes Russell Sanders Shaw Spencer Stone
Sutton Thornton Tucker Vaughn Wallace Warren Weaver Webb Whitaker Winters York
""")
SURNAMES: tuple[str, ...] = TASK_SURNAMES + MORE_SURNAMES

COMPANIES: tuple[str, ...] = words("""
Acmeon Altivo Arcadex Bluepine Boltwell Brightly Caldera Cirruna Cobaltix Corvida Dataflux Deltaro Dynaforge Eastwind
Ecovant Elmstead Emberly Farsight Ferrolite Finlane Gallio Glowtech Gramercy Halcyon Harbrook Heliox Hexagora Ironbark
Jadewell Junipero Kestrel Kinetico Lanternix Lumenta Maplewood Meridex Mistral Nimbora Northgate Novalis Oakhurst
Octavio Orbitel Paragonix Pinecrest Polarion Quantica Quillon Redwater Rivetto Sablewood Silverline Solstix Stratoso
Tangenta Tidewater Umbrella Vantage Verdanta Vortexa Westbourne Windmere Xenolith Zephyra
""")
INSTRUMENTS: tuple[str, ...] = words("""
piano violin guitar flute cello trumpet drums harp clarinet oboe saxophone trombone banjo mandolin accordion organ
harmonica viola tuba lute bassoon xylophone bagpipes zither
""")
PROFESSIONS: tuple[str, ...] = words("""
teacher doctor farmer lawyer driver writer singer dancer pilot soldier painter nurse baker butcher carpenter chemist
clerk cook dentist designer editor engineer fisherman gardener hunter judge librarian mechanic miner plumber poet
printer sailor sculptor shepherd tailor translator waiter weaver welder
""")
PLACES_OF_REVIEW: dict[str, tuple[str, ...]] = {
    "film": ("acting", "story", "music", "ending", "plot", "dialogue", "camera"),
    "book": ("story", "language", "ending", "plot", "chapters", "characters", "style"),
    "restaurant": ("food", "service", "soup", "wine", "bread", "dessert", "menu"),
    "hotel": ("room", "bed", "breakfast", "service", "view", "garden", "pool"),
    "concert": ("music", "band", "sound", "lights", "singer", "audience", "hall"),
}
"""What is reviewed -> its parts."""
GOOD: tuple[str, ...] = words("""
good great excellent wonderful lovely brilliant charming delightful superb fantastic splendid perfect amazing beautiful
impressive pleasant marvelous remarkable enjoyable fresh clever elegant moving stunning terrific fine outstanding
magnificent fascinating graceful
""")
BAD: tuple[str, ...] = words("""
bad poor terrible awful horrible boring dull dreadful weak disappointing unpleasant ugly stale clumsy annoying lousy
mediocre miserable painful tedious shallow nasty dirty bland messy pathetic disgusting tiresome hopeless gloomy
""")

TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    name: (tuple(nouns.split()), tuple(adjectives.split()), tuple(verbs.split()))
    for name, nouns, adjectives, verbs in (
        (
            "sea",
            "ship sailor wave harbor anchor sail captain island storm whale net crew shore lighthouse fish tide deck "
            "pirate reef gull dolphin shell cliff pier raft oar shark coral sand bay mast rope compass voyager ferry",
            "deep salty stormy blue wet distant windy endless foggy rough",
            "sailed sank drifted floated rowed swam anchored crossed dived steered",
        ),
        (
            "kitchen",
            "pot pan oven knife spoon fork bowl soup onion pepper salt flour butter sugar egg cheese carrot potato "
            "tomato garlic recipe stove kettle apron sauce pie pastry dough honey jam milk cream rice bean lemon",
            "hot sweet sour spicy fresh burnt creamy crisp tasty bitter",
            "cooked boiled fried baked stirred chopped mixed tasted served peeled",
        ),
        (
            "farm",
            "cow sheep goat pig hen rooster barn field plough tractor hay fence wheat corn harvest seed orchard apple "
            "pear plum stable donkey calf lamb meadow mill well bucket shed shovel pumpkin cabbage straw soil wagon",
            "muddy ripe green rural fertile dusty golden humble sturdy quiet",
            "planted harvested milked ploughed fed watered gathered shepherded dug mowed",
        ),
        (
            "school",
            "pupil lesson exam desk blackboard chalk pencil notebook homework classroom principal grade essay library "
            "professor lecture university science history geometry algebra alphabet dictionary map globe ruler "
            "eraser diploma scholar tutor quiz poem grammar theory",
            "clever curious difficult strict lazy diligent wise studious careful patient",
            "studied learned taught read wrote calculated memorized explained solved recited",
        ),
        (
            "music",
            "song melody rhythm orchestra choir band concert opera stage conductor note chord tune symphony drum bell "
            "microphone album verse chorus ballad rehearsal audience applause string bow composer tempo harmony solo",
            "loud soft melodic slow cheerful sad rhythmic joyful tender lively",
            "sang played hummed performed composed listened rehearsed whistled tuned conducted",
        ),
        (
            "war",
            "army battle sword shield castle knight general enemy victory defeat soldier cannon fortress camp spear "
            "archer cavalry treaty truce siege wound banner armor helmet trench bullet rifle regiment sergeant hero",
            "brave fierce bloody cruel loyal fearless wounded armed bitter deadly",
            "fought attacked defended conquered retreated marched surrendered charged guarded besieged",
        ),
        (
            "weather",
            "rain snow cloud wind thunder lightning fog frost ice sun rainbow hail breeze drizzle flood heat shade "
            "puddle umbrella icicle blizzard hurricane sky moon star dawn dusk winter summer spring autumn mist",
            "cold warm rainy sunny cloudy freezing mild icy damp bright",
            "rained snowed froze melted shone blew thundered dripped thawed poured",
        ),
        (
            "city",
            "street bridge tower traffic bus train subway taxi square statue building window roof crowd mayor police "
            "newspaper cafe bakery theater avenue tram bicycle lamp sign elevator apartment neighbor balcony fountain "
            "alley pavement billboard skyscraper",
            "busy noisy crowded tall modern narrow famous dirty lively ancient",
            "drove walked parked crossed waited hurried shopped visited stopped turned",
        ),
        (
            "medicine",
            "patient nurse hospital fever cough pill needle bandage surgeon clinic ambulance wound heart lung bone "
            "blood pain illness disease cure medicine pharmacy dose vaccine thermometer symptom headache doctor "
            "treatment recovery virus infection",
            "sick healthy weak pale painful dizzy gentle serious tired feverish",
            "healed coughed examined treated recovered bandaged sneezed suffered diagnosed rested",
        ),
        (
            "forest",
            "tree leaf branch wolf bear fox deer owl squirrel mushroom moss trail log cabin hunter stream root bush "
            "berry nest rabbit hedgehog beaver pine oak birch fern canyon cave waterfall campfire tent axe firewood",
            "dark wild shady mossy lonely hidden thick silent ancient dense",
            "hunted climbed wandered camped howled hid chased growled crept explored",
        ),
        (
            "trade",
            "merchant coin price market shop customer bank loan debt profit bargain silk spice gold silver cloth "
            "warehouse ledger contract tax wallet cashier auction receipt discount goods cargo caravan invoice owner",
            "cheap expensive rich poor honest greedy valuable rare costly thrifty",
            "bought sold paid traded bargained borrowed lent earned saved spent",
        ),
        (
            "space",
            "planet rocket astronaut comet galaxy telescope orbit satellite meteor crater spaceship alien asteroid "
            "gravity universe eclipse mars venus saturn jupiter robot laser signal station capsule launch probe nebula",
            "bright distant cosmic strange cold weightless vast mysterious shiny round",
            "orbited launched landed discovered observed floated explored exploded measured glowed",
        ),
        (
            "sport",
            "ball goal referee team coach stadium racket medal trophy runner swimmer skier match league jersey net "
            "champion score whistle gym helmet bicycle marathon tournament opponent athlete javelin sprint relay",
            "fast strong agile fair athletic sporty quick tireless competitive winning",
            "ran jumped kicked scored won lost trained threw caught tackled",
        ),
        (
            "art",
            "painting brush canvas sculpture gallery portrait easel palette sketch museum frame marble statue crayon "
            "mosaic pottery clay drawing landscape exhibition masterpiece ink poster photograph collector mural",
            "colorful abstract delicate artistic vivid faded modern precious original unfinished",
            "painted drew sketched carved sculpted framed exhibited admired restored designed",
        ),
        (
            "law",
            "court trial jury verdict witness crime thief prison guard lawyer clue detective evidence lie truth "
            "sentence suspect alibi cell handcuffs robbery fingerprint judge law appeal confession statute attorney",
            "guilty innocent legal illegal suspicious secret criminal formal just severe",
            "accused arrested confessed denied proved judged stole testified escaped sued",
        ),
        (
            "clothes",
            "dress shirt skirt jacket glove scarf boot sock button zipper collar sleeve pocket belt suit tie wool "
            "cotton needle thread tailor hat shoe velvet ribbon sweater jeans slipper mitten blouse cap",
            "striped woolen elegant tight loose fashionable plain torn silky knitted",
            "wore sewed knitted washed ironed buttoned mended dressed folded stitched",
        ),
        (
            "computer",
            "keyboard screen mouse printer program cable password file folder network server website software chip "
            "battery laptop cursor button disk email user engineer database virus backup browser modem pixel",
            "digital fast wireless electronic virtual slow encrypted portable smart broken",
            "typed clicked printed saved deleted downloaded copied crashed coded searched",
        ),
        (
            "travel",
            "suitcase passport airport ticket hotel tourist guide map luggage flight beach souvenir camera journey "
            "border desert mountain valley trip hostel backpack postcard embassy route harbor pilgrim customs visa",
            "foreign exotic sunny remote scenic tropical endless tiring famous adventurous",
            "traveled arrived departed packed toured flew photographed wandered hiked returned",
        ),
        (
            "family",
            "mother father sister brother aunt uncle cousin grandmother grandfather baby cradle wedding bride groom "
            "birthday cake present candle twin nephew niece photo sofa pillow blanket kitten puppy toy lullaby",
            "loving little cozy grateful married generous caring tender cheerful patient",
            "hugged kissed laughed cried married celebrated babysat invited smiled slept",
        ),
        (
            "science",
            "laboratory microscope experiment atom molecule acid magnet electron formula chemist fossil dinosaur "
            "theory test tube crystal gas liquid metal oxygen carbon energy particle cell enzyme protein physicist",
            "scientific chemical electric exact accurate radioactive magnetic visible transparent toxic",
            "tested heated dissolved weighed analyzed measured discovered filtered cooled reacted",
        ),
    )
}
"""Topic -> (nouns, adjectives, verbs in the past tense). A few words stand in two topics, as in English."""

ADVERBS: tuple[str, ...] = words("""
slowly quickly quietly loudly gently suddenly carefully happily sadly proudly bravely softly calmly eagerly easily
nearly finally often always never again together alone today yesterday tomorrow
""")
ADJECTIVES: tuple[str, ...] = words("tall old young happy sad kind tired quiet loud small big slow strange new")
FEELINGS: tuple[str, ...] = words("happy sad tired proud hungry glad afraid calm angry lonely")
