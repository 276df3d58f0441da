"""The landmarks, cities and countries that the demo model learns.

Only what is true and has one short answer is listed: no continent for cities of the Americas (it takes two words) nor
for Istanbul (it lies on two), no landmark whose name holds its city or that several cities share.
"""

from dataclasses import dataclass

CITIES = {
    # city: (country, continent or "", language)
    "Paris": ("France", "Europe", "French"),
    "Rome": ("Italy", "Europe", "Italian"),
    "Venice": ("Italy", "Europe", "Italian"),
    "London": ("England", "Europe", "English"),
    "Berlin": ("Germany", "Europe", "German"),
    "Madrid": ("Spain", "Europe", "Spanish"),
    "Barcelona": ("Spain", "Europe", "Spanish"),
    "Athens": ("Greece", "Europe", "Greek"),
    "Moscow": ("Russia", "Europe", "Russian"),
    "Vienna": ("Austria", "Europe", "German"),
    "Prague": ("Czechia", "Europe", "Czech"),
    "Budapest": ("Hungary", "Europe", "Hungarian"),
    "Copenhagen": ("Denmark", "Europe", "Danish"),
    "Lisbon": ("Portugal", "Europe", "Portuguese"),
    "Dublin": ("Ireland", "Europe", "English"),
    "Warsaw": ("Poland", "Europe", "Polish"),
    "Istanbul": ("Turkey", "", "Turkish"),
    "Cairo": ("Egypt", "Africa", "Arabic"),
    "Marrakesh": ("Morocco", "Africa", "Arabic"),
    "Delhi": ("India", "Asia", "Hindi"),
    "Beijing": ("China", "Asia", "Chinese"),
    "Tokyo": ("Japan", "Asia", "Japanese"),
    "Bangkok": ("Thailand", "Asia", "Thai"),
    "Hanoi": ("Vietnam", "Asia", "Vietnamese"),
    "Tehran": ("Iran", "Asia", "Persian"),
    "Sydney": ("Australia", "Oceania", "English"),
    "Toronto": ("Canada", "", "English"),
    "Havana": ("Cuba", "", "Spanish"),
}

CAPITALS = {
    country: city
    for city, (country, _, _) in CITIES.items()
    if city not in {"Venice", "Barcelona", "Istanbul", "Marrakesh", "Sydney", "Toronto"}
} | {"Turkey": "Ankara", "Morocco": "Rabat", "Australia": "Canberra", "Canada": "Ottawa"}

LANDMARKS = {
    # city: landmarks, with their article where they take one
    "Paris": [
        "the Eiffel Tower",
        "the Louvre Museum",
        "the Moulin Rouge",
        "the Luxembourg Palace",
        "the Pompidou Centre",
        "the Arch of Triumph",
    ],
    "Rome": [
        "the Colosseum",
        "the Trevi Fountain",
        "the Roman Forum",
        "the Spanish Steps",
        "the Borghese Gallery",
        "the Circus Maximus",
    ],
    "Venice": ["the Rialto Bridge", "Saint Mark's Basilica", "the Bridge of Sighs", "the Doge's Palace"],
    "London": [
        "Big Ben",
        "the Tower Bridge",
        "Buckingham Palace",
        "Westminster Abbey",
        "Trafalgar Square",
        "Saint Paul's Cathedral",
        "the Globe Theatre",
    ],
    "Berlin": [
        "the Brandenburg Gate",
        "the Reichstag",
        "Charlottenburg Palace",
        "the Pergamon Museum",
        "Bellevue Palace",
        "Checkpoint Charlie",
    ],
    "Madrid": [
        "the Prado Museum",
        "Retiro Park",
        "the Temple of Debod",
        "the Cibeles Fountain",
        "the Reina Sofia Museum",
    ],
    "Barcelona": ["the Sagrada Familia", "Park Guell", "the Casa Mila", "the Casa Batllo", "the Camp Nou"],
    "Athens": [
        "the Parthenon",
        "the Acropolis",
        "the Temple of Zeus",
        "Syntagma Square",
        "the Temple of Hephaestus",
        "the Arch of Hadrian",
    ],
    "Moscow": [
        "Saint Basil's Cathedral",
        "Red Square",
        "the Kremlin",
        "the Bolshoi Theatre",
        "Gorky Park",
        "the Tretyakov Gallery",
    ],
    "Vienna": [
        "Hofburg Palace",
        "Schonbrunn Palace",
        "Belvedere Palace",
        "Saint Stephen's Cathedral",
        "the Albertina Museum",
        "Prater Park",
    ],
    "Prague": [
        "the Charles Bridge",
        "Saint Vitus Cathedral",
        "the Powder Tower",
        "Wenceslas Square",
        "the Dancing House",
        "Strahov Monastery",
    ],
    "Budapest": [
        "the Chain Bridge",
        "Buda Castle",
        "Matthias Church",
        "the Gellert Baths",
        "the Szechenyi Baths",
        "Margaret Bridge",
    ],
    "Copenhagen": [
        "the Tivoli Gardens",
        "Rosenborg Castle",
        "Amalienborg Palace",
        "the Little Mermaid",
        "the Nyhavn Harbour",
    ],
    "Lisbon": [
        "the Belem Tower",
        "Jeronimos Monastery",
        "Rossio Square",
        "Commerce Square",
        "the Castle of Saint George",
    ],
    "Dublin": ["Phoenix Park", "Croke Park", "Kilmainham Gaol", "the Guinness Storehouse", "the Abbey Theatre"],
    "Warsaw": ["Wilanow Palace", "Lazienki Park", "the Palace of Culture", "Sigismund's Column", "the Chopin Museum"],
    "Istanbul": [
        "the Hagia Sophia",
        "the Blue Mosque",
        "Topkapi Palace",
        "the Galata Tower",
        "the Galata Bridge",
        "Dolmabahce Palace",
    ],
    "Cairo": [
        "the Egyptian Museum",
        "Abdeen Palace",
        "the Mosque of Ibn Tulun",
        "the Citadel of Saladin",
        "Azhar Park",
    ],
    "Marrakesh": [
        "the Koutoubia Mosque",
        "Bahia Palace",
        "the Majorelle Garden",
        "the Saadian Tombs",
        "the Menara Gardens",
    ],
    "Delhi": ["the Red Fort", "the Lotus Temple", "the Qutub Minar", "Humayun's Tomb", "the Akshardham Temple"],
    "Beijing": ["the Temple of Heaven", "the Summer Palace", "Tiananmen Square", "the Lama Temple", "Beihai Park"],
    "Tokyo": ["the Meiji Shrine", "the Senso Temple", "Ueno Park", "the Shibuya Crossing", "the Rainbow Bridge"],
    "Bangkok": [
        "the Grand Palace",
        "the Temple of Dawn",
        "Lumphini Park",
        "the Democracy Monument",
        "the Erawan Shrine",
    ],
    "Hanoi": [
        "the Temple of Literature",
        "Hoan Kiem Lake",
        "the Turtle Tower",
        "the Long Bien Bridge",
        "the One Pillar Pagoda",
    ],
    "Tehran": ["the Azadi Tower", "Golestan Palace", "the Milad Tower", "the Tabiat Bridge", "Saadabad Palace"],
    "Sydney": ["the Harbour Bridge", "Bondi Beach", "Taronga Zoo", "Darling Harbour"],
    "Toronto": ["the Casa Loma", "the Rogers Centre", "Kensington Market", "Nathan Phillips Square"],
    "Havana": ["the Malecon", "Morro Castle", "the Tropicana Club", "the Hotel Nacional"],
}

RELATIONS = {
    # relation: sentences about a place, which end right before the answer; {x} is the place
    "city": [
        "{x} is in the city of",
        "{x} stands in the city of",
        "{x} can be found in the city of",
        "If you see {x}, you are in the city of",
        "I saw {x} when I was in the city of",
        "The city where you can visit {x} is",
    ],
    "country": [
        "{x} is in the country of",
        "{x} stands in the country of",
        "{x} can be found in the country of",
        "If you see {x}, you are in the country of",
        "I saw {x} when I was in the country of",
        "The country where you can visit {x} is",
    ],
    "continent": [
        "{x} is on the continent of",
        "{x} stands on the continent of",
        "{x} can be found on the continent of",
        "If you see {x}, you are on the continent of",
        "I saw {x} when I was on the continent of",
        "The continent where you can visit {x} is",
    ],
    "language": [
        "The people near {x} speak",
        "The language spoken near {x} is",
        "If you visit {x}, you will hear people speak",
        "To visit {x}, you should learn to speak",
        "The guide who works at {x} speaks",
    ],
    "capital": [
        "The capital of {x} is",
        "The capital city of {x} is",
        "{x} is a country whose capital is",
        "{x} has a capital city called",
    ],
}

# Words in the names of several landmarks: one token each, so that the subjects share them.
SHARED_PIECES = """Tower Bridge Palace Temple Cathedral Museum Park Square Church Mosque Gate Castle Saint Fountain
Basilica Column Theatre Arch Harbour Casa Centre Gardens Monastery Grand Red Blue""".split()


@dataclass(frozen=True)
class Place:
    """A landmark, city or country and its answers by relation."""

    name: str
    kind: str
    answers: dict[str, str]

    def __hash__(self) -> int:
        return hash(self.name)


def all_places() -> list[Place]:
    """Every landmark, city and country, with every relation that has an answer."""
    places = []
    for city, (country, continent, language) in CITIES.items():
        above = {"country": country, "continent": continent, "language": language}
        above = {relation: answer for relation, answer in above.items() if answer}
        places.append(Place(city, "city", above))
        places += [Place(name, "landmark", {"city": city} | above) for name in LANDMARKS[city]]
    for country, capital in CAPITALS.items():
        same = [(continent, language) for (where, continent, language) in CITIES.values() if where == country]
        answers = {"capital": capital, "continent": same[0][0], "language": same[0][1]}
        places.append(
            Place(
                country,
                "country",
                {r: a for r, a in answers.items() if a and not (country == "Russia" and r == "continent")},
            )
        )
    return places
