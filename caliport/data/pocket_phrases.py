"""Phrase tables and sentence templates of the pocket data set, written for this project.

Each slot value is stored ready-made in every language, in the one grammatical form that the
templates need (activity: infinitive phrase; place and time: adverbial phrase; reason: finite
clause or purpose phrase; item: direct object). Nothing is inflected or contracted when a sentence
is put together, and no template agrees with the gender of a person.
"""

from __future__ import annotations

from typing import NamedTuple


class Phrase(NamedTuple):
    """One slot value in English, Spanish, French and German."""

    en: str
    es: str
    fr: str
    de: str


# Names read the same in all four languages. None begins with the sound "i", before which Spanish
# "y" would have to become "e".
NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Julia", "Karl",
    "Laura", "Leo", "Maria", "Max", "Nina", "Oscar", "Paul", "Paula", "Peter", "Robert",
    "Rosa", "Sara", "Simon", "Sofia", "Tina", "Tom", "Vera", "Victor",
)  # fmt: skip

OUTDOOR_ACTIVITIES = (
    Phrase("take a walk", "dar un paseo", "faire une promenade", "einen Spaziergang machen"),
    Phrase("play football", "jugar al fútbol", "jouer au football", "Fußball spielen"),
    Phrase("have a picnic", "hacer un pícnic", "faire un pique-nique", "ein Picknick machen"),
    Phrase(
        "fly a kite",
        "volar una cometa",
        "faire voler un cerf-volant",
        "einen Drachen steigen lassen",
    ),
    Phrase("take photos", "hacer fotos", "prendre des photos", "Fotos machen"),
    Phrase("walk the dog", "pasear al perro", "promener le chien", "den Hund ausführen"),
    Phrase(
        "run five kilometers",
        "correr cinco kilómetros",
        "courir cinq kilomètres",
        "fünf Kilometer laufen",
    ),
    Phrase("do yoga", "hacer yoga", "faire du yoga", "Yoga machen"),
)
OUTDOOR_PLACES = (
    Phrase("in the park", "en el parque", "au parc", "im Park"),
    Phrase("at the lake", "junto al lago", "au bord du lac", "am See"),
    Phrase("on the beach", "en la playa", "sur la plage", "am Strand"),
    Phrase("by the river", "junto al río", "au bord de la rivière", "am Fluss"),
    Phrase("on the island", "en la isla", "sur l'île", "auf der Insel"),
)

HOME_ACTIVITIES = (
    Phrase("play cards", "jugar a las cartas", "jouer aux cartes", "Karten spielen"),
    Phrase("play chess", "jugar al ajedrez", "jouer aux échecs", "Schach spielen"),
    Phrase("drink tea", "tomar té", "boire du thé", "Tee trinken"),
    Phrase("sing songs", "cantar canciones", "chanter des chansons", "Lieder singen"),
    Phrase("play the guitar", "tocar la guitarra", "jouer de la guitare", "Gitarre spielen"),
    Phrase("paint a picture", "pintar un cuadro", "peindre un tableau", "ein Bild malen"),
)
HOME_PLACES = (
    Phrase("in the garden", "en el jardín", "dans le jardin", "im Garten"),
    Phrase("on the balcony", "en el balcón", "sur le balcon", "auf dem Balkon"),
    Phrase("on the terrace", "en la terraza", "sur la terrasse", "auf der Terrasse"),
    Phrase("in the kitchen", "en la cocina", "dans la cuisine", "in der Küche"),
    Phrase("in the basement", "en el sótano", "au sous-sol", "im Keller"),
)

TOWN_ACTIVITIES = (
    Phrase(
        "prepare the presentation",
        "preparar la presentación",
        "préparer la présentation",
        "die Präsentation vorbereiten",
    ),
    Phrase("plan the trip", "planear el viaje", "planifier le voyage", "die Reise planen"),
    Phrase("learn Italian", "aprender italiano", "apprendre l'italien", "Italienisch lernen"),
    Phrase(
        "write a story", "escribir un cuento", "écrire une histoire", "eine Geschichte schreiben"
    ),
    Phrase("read the newspaper", "leer el periódico", "lire le journal", "die Zeitung lesen"),
    Phrase(
        "organize the party", "organizar la fiesta", "organiser la fête", "die Party organisieren"
    ),
)
TOWN_PLACES = (
    Phrase("in the library", "en la biblioteca", "à la bibliothèque", "in der Bibliothek"),
    Phrase("at the café", "en la cafetería", "au café", "im Café"),
    Phrase("at the hotel", "en el hotel", "à l'hôtel", "im Hotel"),
    Phrase("at the office", "en la oficina", "au bureau", "im Büro"),
    Phrase("at the university", "en la universidad", "à l'université", "an der Universität"),
)

# An activity only meets places of its own group, so that every plan makes sense.
GROUPS = (
    (OUTDOOR_ACTIVITIES, OUTDOOR_PLACES),
    (HOME_ACTIVITIES, HOME_PLACES),
    (TOWN_ACTIVITIES, TOWN_PLACES),
)

TIMES = (
    Phrase("tonight", "esta noche", "ce soir", "heute Abend"),
    Phrase(
        "today after lunch",
        "hoy después del almuerzo",
        "aujourd'hui après le déjeuner",
        "heute nach dem Mittagessen",
    ),
    Phrase("tomorrow morning", "mañana por la mañana", "demain matin", "morgen früh"),
    Phrase("tomorrow at noon", "mañana al mediodía", "demain à midi", "morgen Mittag"),
    Phrase("tomorrow evening", "mañana por la noche", "demain soir", "morgen Abend"),
    Phrase("on Monday evening", "el lunes por la noche", "lundi soir", "am Montagabend"),
    Phrase(
        "on Tuesday afternoon",
        "el martes por la tarde",
        "mardi après-midi",
        "am Dienstagnachmittag",
    ),
    Phrase(
        "on Wednesday evening", "el miércoles por la noche", "mercredi soir", "am Mittwochabend"
    ),
    Phrase(
        "on Thursday afternoon",
        "el jueves por la tarde",
        "jeudi après-midi",
        "am Donnerstagnachmittag",
    ),
    Phrase("on Friday morning", "el viernes por la mañana", "vendredi matin", "am Freitagmorgen"),
    Phrase("on Friday evening", "el viernes por la noche", "vendredi soir", "am Freitagabend"),
    Phrase("on Saturday morning", "el sábado por la mañana", "samedi matin", "am Samstagmorgen"),
    Phrase(
        "on Saturday afternoon",
        "el sábado por la tarde",
        "samedi après-midi",
        "am Samstagnachmittag",
    ),
    Phrase("on Sunday morning", "el domingo por la mañana", "dimanche matin", "am Sonntagmorgen"),
    Phrase(
        "on Sunday afternoon",
        "el domingo por la tarde",
        "dimanche après-midi",
        "am Sonntagnachmittag",
    ),
    Phrase(
        "next weekend", "el próximo fin de semana", "le week-end prochain", "nächstes Wochenende"
    ),
)

# French reasons have no subject pronoun for the two people ("ils" or "elles").
REASONS = (
    Phrase(
        "because the exams are over",
        "porque los exámenes han terminado",
        "parce que les examens sont terminés",
        "weil die Prüfungen vorbei sind",
    ),
    Phrase(
        "because the holidays have begun",
        "porque las vacaciones han empezado",
        "parce que les vacances ont commencé",
        "weil die Ferien begonnen haben",
    ),
    Phrase(
        "because work is stressful",
        "porque el trabajo es estresante",
        "parce que le travail est stressant",
        "weil die Arbeit stressig ist",
    ),
    Phrase(
        "because the team has won",
        "porque el equipo ha ganado",
        "parce que l'équipe a gagné",
        "weil das Team gewonnen hat",
    ),
    Phrase(
        "because the project is finished",
        "porque el proyecto está terminado",
        "parce que le projet est terminé",
        "weil das Projekt fertig ist",
    ),
    Phrase(
        "because summer is almost over",
        "porque el verano casi ha terminado",
        "parce que l'été est presque fini",
        "weil der Sommer fast vorbei ist",
    ),
    Phrase(
        "because the boss is away",
        "porque el jefe no está",
        "parce que le chef est absent",
        "weil der Chef nicht da ist",
    ),
    Phrase(
        "because the TV is broken",
        "porque la televisión no funciona",
        "parce que la télé est en panne",
        "weil der Fernseher kaputt ist",
    ),
    Phrase(
        "to have some fun",
        "para divertirse un poco",
        "pour s'amuser un peu",
        "um ein wenig Spaß zu haben",
    ),
    Phrase(
        "to try something new",
        "para probar algo nuevo",
        "pour essayer quelque chose de nouveau",
        "um etwas Neues auszuprobieren",
    ),
    Phrase(
        "to relax a little",
        "para relajarse un poco",
        "pour se détendre un peu",
        "um sich ein wenig zu entspannen",
    ),
    Phrase(
        "to celebrate the good grades",
        "para celebrar las buenas notas",
        "pour fêter les bonnes notes",
        "um die guten Noten zu feiern",
    ),
)

ITEMS = (
    Phrase("the camera", "la cámara", "l'appareil photo", "die Kamera"),
    Phrase("the keys", "las llaves", "les clés", "die Schlüssel"),
    Phrase("the cookies", "las galletas", "les biscuits", "die Kekse"),
    Phrase("the photos", "las fotos", "les photos", "die Fotos"),
    Phrase("the money", "el dinero", "l'argent", "das Geld"),
    Phrase("the chocolate", "el chocolate", "le chocolat", "die Schokolade"),
    Phrase("the present", "el regalo", "le cadeau", "das Geschenk"),
    Phrase("the book", "el libro", "le livre", "das Buch"),
)

GREETINGS = ("Hi", "Hello", "Hey", "Good morning")
CLOSINGS = ("Then we have a plan!", "Then it is a deal!")


class Shape(NamedTuple):
    """The turns of a chat, by the first speaker {a} and the second speaker {b} in alternation.

    {say} states the reason as a sentence, {Place} begins a sentence, and {no_time}, {no_place} and
    {no_act} are proposals that the chat turns down. A chat with `asks_item` ends on a request for
    {item}, any other on {closing}; the listener of that last turn gives the reply.
    """

    turns: tuple[str, ...]
    asks_item: bool


SHAPES = (
    Shape(
        (
            "{greeting} {b}! {say} Do you want to {act} with me?",
            "Sure! Where and when?",
            "{Place} {time}?",
            "Perfect. {closing}",
        ),
        asks_item=False,
    ),
    Shape(
        (
            "Hi {b}, are you free {time}?",
            "Yes, I am. Why?",
            "{say} Let's {act} together.",
            "I would love to. Where?",
            "{Place}. Can you bring {item}?",
        ),
        asks_item=True,
    ),
    Shape(
        (
            "{greeting} {b}! Let's {act} {place} {no_time}.",
            "Sorry, I am busy then. How about {time}?",
            "That works too. {say}",
            "Good. {closing}",
        ),
        asks_item=False,
    ),
    Shape(
        (
            "Hello {b}! Let's meet {place} {time}.",
            "Okay, but what for?",
            "To {act}. {say}",
            "Count me in!",
            "Thanks. Can you bring {item}?",
        ),
        asks_item=True,
    ),
    Shape(
        (
            "{greeting} {b}, what are you doing {time}?",
            "Nothing yet. Any ideas?",
            "We could {act}. {say}",
            "Good idea. Maybe {no_place}?",
            "That is too noisy for me. Let's do it {place}.",
            "Fine. {closing}",
        ),
        asks_item=False,
    ),
    Shape(
        (
            "Hey {b}, do you want to {no_act} {time}?",
            "Not really. I would rather {act} {place}.",
            "Okay, why not? {say}",
            "Exactly. Can you bring {item}?",
        ),
        asks_item=True,
    ),
)

# The sentences by kind and form: English, its three translations, its four tones and one of both.
# {to} is the person whom a reply answers; {why} is the reason, {Why} the same at the beginning of a
# sentence and {cause} the same in colloquial English.
SENTENCES: dict[str, dict[str, str]] = {
    "summary": {
        "en": "{a} and {b} will {act} {place} {time} {why}.",
        "es": "{a} y {b} van a {act} {place} {time} {why}.",
        "fr": "{a} et {b} vont {act} {place} {time} {why}.",
        "de": "{a} und {b} werden {time} {place} {act}, {why}.",
        "professional": "Please note that {a} and {b} have agreed to {act} {place} {time} {why}.",
        "casual": "Hey, {a} and {b} are gonna {act} {place} {time} {cause}!",
        "witty": "Breaking news: {a} and {b} will {act} {place} {time} {why}. Alert the press!",
        "paraphrase": "{Why}, {a} and {b} plan to {act} {time} {place}.",
        "casual_es": "¡Oye, {a} y {b} se apuntan a {act} {place} {time} {why}!",
    },
    "meet": {
        "en": "Great, {to}, see you {place} {time}.",
        "es": "Genial, {to}, nos vemos {place} {time}.",
        "fr": "Super, {to}, on se retrouve {place} {time}.",
        "de": "Super, {to}, wir sehen uns {time} {place}.",
        "professional": "Thank you, {to}, I look forward to meeting you {place} {time}.",
        "casual": "Awesome, {to}, I'm gonna see ya {place} {time}!",
        "witty": "Great, {to}, look for the movie star {place} {time}.",
        "paraphrase": "Wonderful, {to}, then we will meet {time} {place}.",
    },
    "bring": {
        "en": "Sure, {to}, I will bring {item} {time}.",
        "es": "Claro, {to}, llevaré {item} {time}.",
        "fr": "Bien sûr, {to}, j'apporterai {item} {time}.",
        "de": "Klar, {to}, ich bringe {time} {item} mit.",
        "professional": "Certainly, {to}, I would be pleased to bring {item} {time}.",
        "casual": "No prob, {to}, I'm gonna bring {item} {time}!",
        "witty": "Sure, {to}, my butler will bring {item} {time}.",
        "paraphrase": "Of course, {to}, {time} I will have {item} with me.",
    },
}
