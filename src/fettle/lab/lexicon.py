"""The words of the small world: every name in English and in Chinese.

Each table is a text of lines ``English Chinese [more]``, read once into tuples of `Word`. The tables are data;
which town lies in which country, who lives where and what is red is drawn in `world.py`.
"""

from __future__ import annotations

from typing import NamedTuple


class Word(NamedTuple):
    """A word of the lexicon: its English and Chinese form and, where the table has them, further columns."""

    en: str
    zh: str
    more: tuple[str, ...] = ()


def table(text: str) -> tuple[Word, ...]:
    """Read entries separated by commas or newlines, columns by spaces; an underscore stands for a space in a column."""
    rows = (entry.split() for line in text.strip().splitlines() for entry in line.split(",") if entry.strip())
    return tuple(Word(row[0].replace("_", " "), row[1], tuple(c.replace("_", " ") for c in row[2:])) for row in rows)


WOMEN = table("""
Anna 安娜, Bella 贝拉, Clara 克拉拉, Diana 黛安娜, Emma 艾玛, Fiona 菲奥娜, Grace 格蕾丝, Helen 海伦, Irene 艾琳
Julia 朱莉娅, Karen 凯伦, Laura 劳拉, Maria 玛丽亚, Nancy 南希, Olivia 奥利维亚, Paula 宝拉, Quinn 奎恩, Rosa 罗莎
Sarah 莎拉, Tina 蒂娜, Ursula 乌苏拉, Vera 薇拉, Wendy 温迪, Yvonne 伊冯娜, Zoe 佐伊, Alice 爱丽丝, Betty 贝蒂
Cathy 凯茜, Daisy 黛西, Eva 伊娃, Flora 弗洛拉, Gina 吉娜, Hannah 汉娜, Ivy 艾薇, Jane 简妮, Kate 凯特, Lily 莉莉
Molly 莫莉, Nora 诺拉, Olga 奥尔加, Penny 佩妮, Rachel 蕾切尔, Sophie 苏菲, Tara 塔拉, Vicky 维琪, Wanda 旺达
Amy 艾米, Bonnie 邦妮, Carol 卡萝尔, Donna 唐娜, Elsa 艾尔莎, Frida 弗里达, Gloria 格洛丽亚, Heidi 海蒂, Iris 伊丽丝
Judy 朱迪, Kelly 凯莉, Lucy 露西, Mona 莫娜, Nina 妮娜, Opal 欧珀, Peggy 佩吉, Ruth 露丝, Stella 斯黛拉, Tessa 泰莎
Uma 乌玛, Viola 维奥拉, Winnie 温妮, Yara 雅拉, Zelda 塞尔达, Abby 艾比, Becky 贝姬, Cora 科拉, Dora 多拉, Edith 伊迪丝
""")

MEN = table("""
Adam 亚当, Ben 本恩, Carl 卡尔, David 大卫, Eric 埃里克, Frank 弗兰克, George 乔治, Henry 亨利, Ivan 伊万, Jack 杰克
Kevin 凯文, Leo 利奥, Mark 马克, Nick 尼克, Oscar 奥斯卡, Paul 保罗, Quentin 昆汀, Robert 罗伯特, Sam 山姆, Tom 汤姆
Victor 维克多, Walter 沃尔特, Xavier 泽维尔, Yuri 尤里, Zack 扎克, Alan 艾伦, Bruno 布鲁诺, Chris 克里斯, Daniel 丹尼尔
Edgar 埃德加, Felix 菲利克斯, Gary 加里, Hugo 雨果, Ian 伊恩, James 詹姆斯, Kurt 库尔特, Lucas 卢卡斯, Martin 马丁
Noah 诺亚, Otto 奥托, Peter 彼得, Ralph 拉尔夫, Simon 西蒙, Thomas 托马斯, Umberto 翁贝托, Vincent 文森特, William 威廉
Albert 阿尔伯特, Bob 鲍勃, Charles 查尔斯, Dennis 丹尼斯, Edward 爱德华, Fred 弗雷德, Gordon 戈登, Harry 哈利, Isaac 艾萨克
John 约翰, Kenny 肯尼, Louis 路易, Max 麦克斯, Nathan 内森, Oliver 奥利弗, Philip 菲利普, Richard 理查德, Steven 史蒂文
Tim 蒂姆, Ulric 乌尔里克, Vernon 弗农, Wayne 韦恩, Yann 扬恩, Zane 赞恩, Andy 安迪, Boris 鲍里斯, Colin 科林, Derek 德里克
""")

TOWNS = table("""
Stonebridge 石桥, Rivermouth 河口, Oakton 橡树镇, Sandport 沙港, Highcliff 高崖, Lakeside 湖边镇, Mistvale 雾谷, Sunford 阳津
Windham 风村, Starfall 星落, Ironhill 铁山, Saltmarsh 盐沼, Pinewood 松林, Foxley 狐村, Wolfden 狼穴, Bearcove 熊湾
Eagleton 鹰镇, Cedarville 雪松城, Maplewood 枫林, Thornbury 荆堡, Frostgate 霜门, Rainford 雨津, Moonbay 月湾, Snowdale 雪谷
Fernhill 蕨山, Millbrook 磨坊溪, Kingsport 王港, Queensbury 后堡, Bellwater 铃水, Deepwell 深井, Longmeadow 长甸, Broadford 宽津
Coldstream 冷溪, Warmspring 暖泉, Newhaven 新港, Easton 东镇, Weston 西镇, Norton 北镇, Sutton 南镇, Midway 中途镇
""")

COUNTRIES = table("""
Arvia 阿维亚, Belmar 贝尔马, Corland 科兰, Dorania 多拉尼亚, Estria 埃斯特里亚, Falden 法尔登, Galwin 加尔温, Hestia 赫斯提亚
""")

# A job, and the place where it is done.
JOBS = table("""
teacher 老师 school 学校, doctor 医生 hospital 医院, baker 面包师 bakery 面包店, farmer 农民 farm 农场, painter 画家 studio 画室
singer 歌手 theatre 剧院, driver 司机 garage 车库, cook 厨师 kitchen 厨房, nurse 护士 clinic 诊所, writer 作家 library 图书馆
tailor 裁缝 shop 店铺, sailor 水手 harbour 港口, carpenter 木匠 workshop 作坊, gardener 园丁 garden 花园, pilot 飞行员 airport 机场
dentist 牙医 practice 牙科诊所, lawyer 律师 office 办公室, judge 法官 court 法院, miner 矿工 mine 矿山, fisher 渔夫 river 河边
dancer 舞者 hall 大厅, clerk 职员 bank 银行, guard 守卫 castle 城堡, engineer 工程师 factory 工厂
""")

OBJECTS = table("""
kite 风筝, lamp 台灯, clock 时钟, drum 鼓, violin 小提琴, bicycle 自行车, boat 小船, car 汽车, table 桌子, chair 椅子
sofa 沙发, bed 床, mirror 镜子, vase 花瓶, basket 篮子, bucket 水桶, ladder 梯子, hammer 锤子, knife 刀, spoon 勺子
fork 叉子, plate 盘子, bowl 碗, cup 杯子, bottle 瓶子, teapot 茶壶, pan 锅, umbrella 雨伞, camera 照相机, radio 收音机
telescope 望远镜, compass 指南针, map 地图, book 书, pen 钢笔, pencil 铅笔, brush 刷子, ruler 尺子, globe 地球仪, statue 雕像
bell 铃铛, candle 蜡烛, lantern 灯笼, whistle 哨子, flute 笛子, guitar 吉他, piano 钢琴, trumpet 小号, puzzle 拼图, doll 娃娃
ball 球, sled 雪橇, wagon 马车, tent 帐篷, rope 绳子, anchor 船锚, key 钥匙, ring 戒指, crown 王冠, mask 面具
""")

# Things without an owner or a colour of their own: stories and sentences may paint them as they like.
CLOTHES = table(
    "scarf 围巾, hat 帽子, coat 外套, shirt 衬衫, dress 裙子, bag 书包, glove 手套, sock 袜子, blanket 毯子, jacket 夹克"
)

COLOURS = table(
    "red 红色, blue 蓝色, green 绿色, yellow 黄色, black 黑色, white 白色, brown 棕色, purple 紫色, pink 粉色, gray 灰色"
)

MATERIALS = table(
    "wood 木头, iron 铁, glass 玻璃, silver 银, stone 石头, paper 纸, leather 皮革, clay 陶土, copper 铜, plastic 塑料"
)

FOODS = table("""
apple 苹果, pear 梨, fig 无花果, plum 李子, grape 葡萄, lemon 柠檬, mango 芒果, peach 桃子, melon 甜瓜, cherry 樱桃, bread 面包
cheese 奶酪, rice 米饭, soup 汤, cake 蛋糕, honey 蜂蜜, salad 沙拉, pie 馅饼, tea 茶, milk 牛奶, coffee 咖啡, onion 洋葱, carrot 胡萝卜
butter 黄油
""")

# An animal, and its plural.
ANIMALS = table("""
cat 猫 cats, dog 狗 dogs, horse 马 horses, cow 牛 cows, sheep 绵羊 sheep, pig 猪 pigs, goat 山羊 goats, duck 鸭子 ducks, hen 母鸡 hens
fox 狐狸 foxes, wolf 狼 wolves, bear 熊 bears, lion 狮子 lions, tiger 老虎 tigers, monkey 猴子 monkeys, rabbit 兔子 rabbits
mouse 老鼠 mice, frog 青蛙 frogs, snake 蛇 snakes, eagle 老鹰 eagles, owl 猫头鹰 owls, whale 鲸鱼 whales, panda 熊猫 pandas
camel 骆驼 camels
""")

# A verb: third person, Chinese, plain form, past.
VERBS = table("""
walks 走路 walk walked, dances 跳舞 dance danced, sleeps 睡觉 sleep slept, sings 唱歌 sing sang, runs 跑步 run ran
swims 游泳 swim swam, works 工作 work worked, waits 等待 wait waited, laughs 大笑 laugh laughed, cooks 做饭 cook cooked
plays 玩耍 play played, rests 休息 rest rested, studies 学习 study studied, paints 画画 paint painted, eats 吃饭 eat ate
drinks 喝水 drink drank, sits 坐着 sit sat, stands 站着 stand stood, cries 哭泣 cry cried, smiles 微笑 smile smiled
jumps 跳跃 jump jumped, talks 说话 talk talked, writes 写字 write wrote, rides 骑车 ride rode
""")

# An adjective: Chinese, its opposite, the opposite in Chinese.
OPPOSITES = table("""
hot 热 cold 冷, big 大 small 小, tall 高 short 矮, happy 高兴 sad 难过, old 老 young 年轻, fast 快 slow 慢, clean 干净 dirty 肮脏
light 明亮 dark 黑暗, full 满 empty 空, open 开着 closed 关着, rich 富有 poor 贫穷, strong 强壮 weak 虚弱, hard 硬 soft 软, wet 湿 dry 干
near 近 far 远, early 早 late 晚, good 好 bad 坏, loud 吵闹 quiet 安静, sweet 甜 bitter 苦, brave 勇敢 afraid 害怕
""")

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
NUMBERS_ZH = "零 一 二 三 四 五 六 七 八 九 十 十一 十二 十三 十四 十五 十六 十七 十八 十九 二十".split()
DAYS = table(
    "Monday 星期一, Tuesday 星期二, Wednesday 星期三, Thursday 星期四, Friday 星期五, Saturday 星期六, Sunday 星期日"
)


def plural(noun: str) -> str:
    """The English plural of a regular noun of the lexicon; irregular ones stand in the table of animals."""
    for animal in ANIMALS:
        if animal.en == noun:
            return animal.more[0]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("fe"):
        return noun[:-2] + "ves"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


COUNTED = frozenset("apple pear fig plum grape lemon mango peach melon cherry cake salad pie onion carrot".split())


def liked(food: str) -> str:
    """The food as something to like: ``apples``, but ``rice``."""
    return plural(food) if food in COUNTED else food


def article(noun: str) -> str:
    """The noun with its indefinite article: ``a kite``, ``an umbrella``."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
